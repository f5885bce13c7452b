"""DoRA: the direction of each row of a weight learns by LoRA, its length by a magnitude (Liu et al., arXiv 2402.09353).

    W' = m (W + s B A) / |W + s B A|, by output row       (eq. 5; the norm is a constant in the backward pass, sec. 4.3)

The frozen path sees the input without dropout, as with LoRA. PEFT's DoRA computes both paths with dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.lora import Lora
from qlora_retrain.lm import base_formats
from qlora_retrain.lm.dora import row_norms, scale_rows


class Dora(Lora):
    """Rows are scaled behind the fused layers: m / |W + s B A| is one number for each output."""

    has_magnitudes = True

    def extend(self, layer: Any, start: object) -> None:
        """Start with the lengths of the frozen rows, so that nothing changes; PEFT's are rounded to 16 bits."""
        layer.lora_magnitude_vector[ADAPTER_NAME].weight.data = self._norms(layer)

    def scale_output(self, layer: Any, output: Tensor) -> Tensor:
        """Scale each output by its row's magnitude."""
        magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
        return scale_rows(output, magnitude / self._norms(layer), layer.base_layer.bias)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _norms(self, layer: Any) -> Tensor:
        return row_norms(base_formats.layer_weight(layer.base_layer), *self.matrices(layer), self.scale(layer))
