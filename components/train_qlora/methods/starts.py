"""The methods whose adapters start from the original weights; `quantize_model` has written the start.

lora-xs   W is near U S V^T of a small rank; B = U S and A = V^T are frozen, and R (rank, rank) between them learns
(Balazy et al., arXiv 2405.17604)
loftq     the adapter starts from what quantization loses of each weight (Li et al., arXiv 2310.08659)
lq-lora   the same from another alternation, which gives it the largest singular vectors first (Guo et al., arXiv
2311.12023)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter, ParameterDict, init

from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.lora import Lora, Matrices

START_STD = 1e-5  # of R, as in the paper


class LoraXs(Lora):
    """The update is B R A; only R learns."""

    needs_start = True

    def extend(self, layer: Any, start: Matrices | None) -> None:
        """Freeze the start's matrices, and put R between them, near zero."""
        for matrix, values in zip(super().matrices(layer), self.required(start), strict=True):
            matrix.data.copy_(values)
            matrix.requires_grad_(False)
        between = layer.lora_A[ADAPTER_NAME].weight.new_empty(self.rank, self.rank)
        layer.lora_R = ParameterDict({ADAPTER_NAME: Parameter(init.normal_(between, std=START_STD))})

    def matrices(self, layer: Any) -> Matrices:
        """Return A (rank, in) and B R (out, rank)."""
        a, b = super().matrices(layer)
        return a, b @ layer.lora_R[ADAPTER_NAME]

    def to_lora(self, tensors: Mapping[str, Tensor], scale: float) -> Matrices:
        """Return A and B R with the scale."""
        return tensors["A"], tensors["B"] @ tensors["R"] * scale

    def beside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return R, which is all that tells two adapters over one start apart."""
        return {"R": tensors["R"]}


class LoftQ(Lora):
    """LoRA from another start: scale * B A is the start's product, which is what the packed base lacks."""

    needs_start = True

    def extend(self, layer: Any, start: Matrices | None) -> None:
        """Copy the start, with B divided by the scale that the forward pass multiplies by."""
        matrices, (start_a, start_b) = self.matrices(layer), self.required(start)
        for matrix, values in zip(matrices, (start_a, start_b / self.scale(layer)), strict=True):
            matrix.data.copy_(values)
