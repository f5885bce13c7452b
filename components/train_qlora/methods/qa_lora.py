"""QA-LoRA: the adapter adds one number to all weights of a group of a 4-bit base (Xu et al., arXiv 2309.14717).

    delta W = s B A R        A (rank, in / 32), and R repeats each of its columns for the 32 inputs of a group

So A sees the sum of a group's inputs, and delta W is the same for all of them. With `quantize.format: int4` a weight is
d q + m, with d and m of its group, so the trained model is one in 4 bits again: m moves, and d and q stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Linear, init
from torch.nn.functional import linear

from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.lora import Lora, Matrices
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.base_formats.int4 import GROUP_SIZE


class QaLora(Lora):
    """The matrices are (A R, B), so that everything else sees plain LoRA."""

    def extend(self, layer: Any, start: object) -> None:
        """Replace A by one with an input for each group; B stays at zero.

        Raises:
            UsageError: If a layer's inputs do not fill groups, so that its weight stays in 16 bits.
        """
        matrix = layer.lora_A[ADAPTER_NAME]
        if matrix.in_features % GROUP_SIZE:
            raise UsageError(
                f"train.method: qa-lora needs layers whose inputs fill groups of {GROUP_SIZE}, and one has "
                f"{matrix.in_features} inputs; name the others in train.target_modules, or set train.method: lora"
            )
        layer.lora_A[ADAPTER_NAME] = GroupedLinear(matrix)

    def matrices(self, layer: Any) -> Matrices:
        """Return A R (rank, in) and B (out, rank)."""
        a, b = super().matrices(layer)
        return repeat_groups(a), b

    def to_lora(self, tensors: Mapping[str, Tensor], scale: float) -> Matrices:
        """Return A R, and B with the scale."""
        return repeat_groups(tensors["A"]), tensors["B"] * scale


class GroupedLinear(Linear):  # type: ignore[misc]
    """A layer whose weight has one column for each group of inputs.

    It starts as the paper has it: as a layer of in / 32 inputs, whose input is a sum of 32. For inputs that are
    independent its output is then sqrt(32) times as large as that of LoRA's A. The paper's learning rates are a tenth
    of those of QLoRA.
    """

    def __init__(self, source: Linear) -> None:
        weight = source.weight
        super().__init__(
            source.in_features // GROUP_SIZE, len(weight), bias=False, device=weight.device, dtype=weight.dtype
        )
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return x R^T A^T (..., rank), as the fused layers compute it too."""
        output: Tensor = linear(x, repeat_groups(self.weight))
        return output


def repeat_groups(a: Tensor) -> Tensor:
    """Return A R (rank, in) of A (rank, in / 32)."""
    return a.repeat_interleave(GROUP_SIZE, dim=1)
