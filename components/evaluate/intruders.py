"""Intruder dimensions: what the adapter put among a layer's strongest directions that the base did not have.

Shuttleworth, Andreas, Torralba and Sharma 2024, "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv
2410.21228): a singular vector of W + BA whose largest absolute cosine similarity to any singular vector of W lies below
epsilon. As theirs (and PEFT's `reduce_intruder_dimension`), the left singular vectors are compared, and of W + BA the
strongest `top`. W is what the challenger computes with: the 4-bit weights' values. Of DoRA the magnitudes are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain.core import progress

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


_ENOUGH = 2  # of the base's vectors, times those looked at
_SURE = 1e-10  # of the largest squared singular value: below, a vector of the Gram matrix is not known well enough


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted matrix.

    Attributes:
        name: Its path in the model.
        intruders: Of the directions looked at, those unlike any of the base's.
        looked_at: How many were.
        least_similarity: The largest cosine of the one that is least like the base.
    """

    name: str
    intruders: int
    looked_at: int
    least_similarity: float


def count(model: PeftModel, *, top: int, epsilon: float) -> list[Layer]:
    """The intruder dimensions of every adapted linear layer, in the model's order; none looked at with `top` 0."""
    import torch

    found: list[Layer] = []
    if not top:
        return found
    total = sum(1 for _ in _adapted(model))
    with torch.inference_mode():
        for name, base, tuned in pairs(model):
            similar = similarity(base, tuned, top)
            found.append(Layer(name, int((similar < epsilon).sum()), len(similar), float(similar.min())))
            progress.update("intruder dimensions", len(found), total)
    return found


def pairs(model: PeftModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each adapted matrix: its path in the model, W and W + BA, (out, in) in fp32."""
    for name, module in _adapted(model):
        base = _weight(module.get_base_layer())
        yield name.removeprefix("base_model.model."), base, base + module.get_delta_weight("default").float()


def similarity(base: torch.Tensor, tuned: torch.Tensor, top: int) -> torch.Tensor:
    """Of the strongest left singular vectors of `tuned`, the largest absolute cosine to any of `base`'s: (top,).

    The base's vectors are orthonormal, so the squares of a direction's cosines to all of them sum to 1 at most. Where
    those to the base's strongest ones leave less than the largest of them squared, no other one can be larger, and the
    rest is never computed: so it is for almost every matrix without intruders.
    """
    new, old = _strongest(tuned, top), _strongest(base, _ENOUGH * top)
    cosines = new.T @ old
    best = cosines.abs().amax(dim=1)
    left = 1 - cosines.square().sum(dim=1)
    if old.shape[1] < min(base.shape) and bool((best.square() < left).any()):
        every = _strongest(base, min(base.shape))
        best = (new.T @ every).abs().amax(dim=1)
    return best


def _strongest(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The left singular vectors (out, count) of the largest singular values, the largest first, in fp64.

    On a CPU those of the smaller of M M^T and M^T M in fp64, which finds some without the others; the squared condition
    costs half of fp64's 16 digits, which leaves more than an SVD in fp32 has. Where that is not so, the SVD.
    """
    import torch
    from scipy.linalg import eigh

    count = min(count, *matrix.shape)
    if count < min(matrix.shape) and not matrix.is_cuda:
        values = matrix.double().numpy()
        wide = values.shape[0] <= values.shape[1]
        gram = values @ values.T if wide else values.T @ values
        least = len(gram) - count
        squares, vectors = eigh(gram, subset_by_index=[least, len(gram) - 1], driver="evr")
        if squares[0] > _SURE * squares[-1]:
            left = vectors if wide else values @ vectors / squares**0.5
            return torch.from_numpy(left[:, ::-1].copy())
    found, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    return found[:, :count].double()


def by_block(layers: Sequence[Layer]) -> dict[str, float]:
    """Intruders summed over the matrices of each of the model's blocks, for a chart."""
    sums: dict[str, float] = defaultdict(float)
    for layer in layers:
        block = re.search(r"\.(\d+)\.", layer.name)
        sums[f"layer {block[1]}" if block else layer.name] += layer.intruders
    return dict(sums)


def _adapted(model: PeftModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_A))


def _weight(module: Any) -> torch.Tensor:
    """The matrix (out, in) in fp32, unpacked where it is kept in 4 bits."""
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(module)
    return weight.float()
