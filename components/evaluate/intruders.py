"""Intruder dimensions: what the adapter put among a layer's strongest directions that the base did not have.

Shuttleworth, Andreas, Torralba and Sharma 2024, "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv
2410.21228): a singular vector of W + BA whose largest absolute cosine similarity to any singular vector of W lies below
epsilon. As theirs (and PEFT's `reduce_intruder_dimension`), the left singular vectors are compared, and of W + BA the
strongest `top`. W is what the challenger computes with: the 4-bit weights' values. Of DoRA the magnitudes are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain import progress

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


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
    from peft.tuners.lora import LoraLayer

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_A)] if top else []
    found = []
    with torch.inference_mode():
        for done, (name, module) in enumerate(layers, 1):
            base = _weight(module.get_base_layer())
            similar = similarity(base, base + module.get_delta_weight("default").float(), top)
            found.append(
                Layer(
                    name.removeprefix("base_model.model."),
                    int((similar < epsilon).sum()),
                    len(similar),
                    float(similar.min()),
                )
            )
            progress.update("intruder dimensions", done, len(layers))
    return found


def similarity(base: torch.Tensor, tuned: torch.Tensor, top: int) -> torch.Tensor:
    """Of the strongest left singular vectors of `tuned`, the largest absolute cosine to any of `base`'s: (top,)."""
    import torch

    old, _, _ = torch.linalg.svd(base, full_matrices=False)
    new, _, _ = torch.linalg.svd(tuned, full_matrices=False)
    best: torch.Tensor = (new[:, :top].T @ old).abs().amax(dim=1)
    return best


def by_block(layers: Sequence[Layer]) -> dict[str, float]:
    """Intruders summed over the matrices of each of the model's blocks, for a chart."""
    sums: dict[str, float] = defaultdict(float)
    for layer in layers:
        block = re.search(r"\.(\d+)\.", layer.name)
        sums[f"layer {block[1]}" if block else layer.name] += layer.intruders
    return dict(sums)


def _weight(module: Any) -> torch.Tensor:
    """The matrix (out, in) in fp32, unpacked where it is kept in 4 bits."""
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(module)
    return weight.float()
