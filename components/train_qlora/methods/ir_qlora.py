"""IR-QLoRA's elastic connection: LoRA whose two matrices also pass their inputs on, averaged (arXiv 2402.05445).

    u = A x + beta_1 pool(x)          y = B u + beta_2 repeat(u)          (sec. 3.3; x (in,), u (rank,), y (out,))

`pool` averages neighbouring inputs until there are `rank` numbers, and `repeat` repeats those for the outputs. Both are
products with fixed matrices P and R, so the update is the plain LoRA (B + beta_2 R) (A + beta_1 P). Only the two
factors of a layer learn beside A and B; they begin at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterDict

from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.lora import Lora, Matrices


class IrQLora(Lora):
    """The matrices are (A + beta_1 P, B + beta_2 R)."""

    def extend(self, layer: Any, start: Matrices | None) -> None:
        """Start with both factors at zero."""
        factors = super().matrices(layer)[0].new_zeros(2)
        layer.lora_factors = ParameterDict({ADAPTER_NAME: Parameter(factors)})

    def matrices(self, layer: Any) -> Matrices:
        """Return A + beta_1 P (rank, in) and B + beta_2 R (out, rank)."""
        return connect(*super().matrices(layer), layer.lora_factors[ADAPTER_NAME])

    def to_lora(self, tensors: Mapping[str, Tensor], scale: float) -> Matrices:
        """Return the same with the scale in the second."""
        a, b = connect(tensors["A"], tensors["B"], tensors["factors"])
        return a, b * scale


def connect(a: Tensor, b: Tensor, factors: Tensor) -> Matrices:
    """Return A + beta_1 P and B + beta_2 R of A (rank, in), B (out, rank) and the two factors (2,)."""
    pool = group_means(len(a), a.shape[1], a.device)
    # Repeating is averaging backwards: each output takes the numbers, of which it would be an average, averaged.
    repeat = group_means(b.shape[1], len(b), b.device).T
    repeat = repeat / repeat.sum(1, keepdim=True)
    return torch.addcmul(a, factors[0], pool), torch.addcmul(b, factors[1], repeat)


@cache
def group_means(rank: int, width: int, device: torch.device) -> Tensor:
    """Return the matrix (rank, width) that averages groups of neighbours, of which there are as many as divide both.

    Where the rank does not divide the width, there are fewer groups than ranks, and neighbouring ranks have the same.
    """
    groups = math.gcd(rank, width)
    # It is used again while training, which refuses tensors that inference mode has made.
    with torch.inference_mode(mode=False):
        means = torch.eye(groups, device=device) * (groups / width)
        return means.repeat_interleave(rank // groups, 0).repeat_interleave(width // groups, 1)
