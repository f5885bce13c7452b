"""Store a tensor in one of GGUF's types, and find numbers that the type cannot hold.

The types with blocks of 32 numbers are written by the `gguf` package. Those of a mixture (`gguf-q4_k_m`) are written by
llama.cpp's own quantizer, a function of its library, which the optional package xllamacpp holds.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from qlora_retrain.lm import gguf_mixtures

# Where the numbers of type f16 lie in the bytes of a block: the number itself, or the block's scales and minima.
_F16_BYTES = {
    Type.F16: slice(0, 2),
    Type.Q8_0: slice(0, 2),
    Type.Q4_0: slice(0, 2),
    Type.Q4_1: slice(0, 4),
    Type.Q5_0: slice(0, 2),
    Type.Q5_1: slice(0, 4),
    Type.Q4_K: slice(0, 4),
    Type.Q5_K: slice(0, 4),
    Type.Q6_K: slice(208, 210),
}


def quantize(values: torch.Tensor, tensor_type: Type) -> NDArray[np.uint8]:
    """Return the bytes of a tensor; where a number is too large for f16, they hold an infinite one."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored: NDArray[np.uint8] = gguf.quants.quantize(values.numpy(), tensor_type).view(np.uint8)
    return stored


def quantize_by_llama_cpp(values: torch.Tensor, tensor_type: Type) -> NDArray[np.uint8]:
    """Return the bytes of a matrix as llama.cpp's quantizer writes them; NaN alone where a number does not fit."""
    if tensor_type in (Type.F32, Type.F16):
        return quantize(values, tensor_type)
    rows, row_length = values.shape
    stored = np.full(gguf.quant_shape_to_byte_shape((rows, row_length), tensor_type), 0xFF, dtype=np.uint8)
    # The quantizer writes finite nonsense for some of these numbers.
    if float(values.abs().max()) > float(np.finfo(np.float16).max):
        return stored
    source = np.ascontiguousarray(values.numpy(), dtype=np.float32)
    _library().ggml_quantize_chunk(int(tensor_type), source.ctypes.data, stored.ctypes.data, 0, rows, row_length, None)
    return stored


def is_finite(stored: NDArray[np.uint8], tensor_type: Type) -> bool:
    """Return whether the numbers of type f16 are finite: all of them, or the scales of blocks."""
    if tensor_type not in _F16_BYTES:
        return True
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    numbers = stored.reshape(-1, block_bytes)[:, _F16_BYTES[tensor_type]].copy().view(np.float16)
    return bool(np.isfinite(numbers).all())


@cache
def _library() -> ctypes.CDLL:
    """Load llama.cpp's library: the package's extension module, which holds it and shows its functions."""
    spec = find_spec(gguf_mixtures.PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    paths = [path for folder in folders for path in sorted(folder.glob("*.so"))]
    library = ctypes.CDLL(str(paths[0]))
    address, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, size, size, size, address]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
