"""DoRA's row scale, one number for each output of a layer: m / |W + B A| (Liu et al., arXiv 2402.09353, eq. 5).

Training, scoring and counting intruder dimensions use this one computation, in fp32. PEFT computes the lengths in the
precision of the input. In bf16 every output is then off by up to 0.4 %, and by something else than the merged weights.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from qlora_retrain.lm import base_formats

if TYPE_CHECKING:
    from torch import Tensor

# fp32 copies of weights at a time: 4 MiB; on a GPU 256 MiB, where many small operations would take longer.
_CHUNK_WEIGHTS, _CHUNK_WEIGHTS_GPU = 1 << 20, 1 << 26


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the length of each row of W + scale * B A: (out,), in fp32.

    Args:
        weight: W (out, in), in any float type.
        a: A (rank, in).
        b: B (out, rank).
        scale: alpha / rank, or 1 where B has it.
    """
    import torch

    rows = max(1, (_CHUNK_WEIGHTS_GPU if weight.is_cuda else _CHUNK_WEIGHTS) // weight.shape[1])
    parts = zip(weight.split(rows), b.float().split(rows), strict=True)
    a = a.float()
    return torch.cat(
        [torch.linalg.vector_norm(torch.addmm(w.float(), part, a, alpha=scale), dim=1) for w, part in parts]
    )


def scale_rows(output: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Scale each output (..., out) of a layer by its number (out,), but not the bias that is part of it."""
    row_scale = row_scale.to(output.dtype)
    return output * row_scale if bias is None else (output - bias) * row_scale + bias


def fix_row_scales(module: Any, adapter_name: str) -> None:
    """Compute a loaded layer's row scale once, and let its forward pass use it; a layer without magnitudes stays as is.

    The scale is kept as `row_scale` of the layer.
    """
    if adapter_name not in getattr(module, "lora_magnitude_vector", ()):
        return
    a, b = module.lora_A[adapter_name].weight.data, module.lora_B[adapter_name].weight.data
    weight = base_formats.layer_weight(module.get_base_layer())
    norms = row_norms(weight, a, b, module.scaling[adapter_name])
    module.row_scale = module.lora_magnitude_vector[adapter_name].weight.data.float() / norms

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        output = output + self.lora_B[adapter_name](self.lora_A[adapter_name](x)) * self.scaling[adapter_name]
        return scale_rows(output, self.row_scale, self.base_layer.bias)

    module.forward = MethodType(forward, module)
