"""Store a tensor in one of GGUF's types, by the `gguf` package, and find numbers that the type cannot hold."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

# The bytes of a block that are numbers of type f16: the number itself, or the block's scale and minimum.
_F16_BYTES = {
    gguf.GGMLQuantizationType.F16: 2,
    gguf.GGMLQuantizationType.Q8_0: 2,
    gguf.GGMLQuantizationType.Q4_0: 2,
    gguf.GGMLQuantizationType.Q4_1: 4,
}


def quantize(values: torch.Tensor, tensor_type: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return the bytes of a tensor; where a number is too large for f16, they hold an infinite one."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored: NDArray[np.uint8] = gguf.quants.quantize(values.numpy(), tensor_type).view(np.uint8)
    return stored


def is_finite(stored: NDArray[np.uint8], tensor_type: gguf.GGMLQuantizationType) -> bool:
    """Return whether the numbers of type f16 are finite: all of them, or those with which a block begins."""
    if tensor_type not in _F16_BYTES:
        return True
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    numbers = stored.reshape(-1, block_bytes)[:, : _F16_BYTES[tensor_type]].copy().view(np.float16)
    return bool(np.isfinite(numbers).all())
