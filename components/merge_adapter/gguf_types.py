"""Choose the type of every tensor of a GGUF file: the same as llama.cpp's quantizer chooses for this file type.

A mixture (`q4_k_m`, `q5_k_m`) gives more bits to the tensors that suffer most from fewer: values and down projections
of some layers, and the output. A row whose length does not fit into the blocks of a type gets the next type that does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType as Type

from components.merge_adapter.gguf_layout import EMBEDDINGS, OUTPUT
from qlora_retrain.lm import gguf_mixtures

MATRIX_TYPES = {
    "gguf-f16": Type.F16,
    "gguf-q8_0": Type.Q8_0,
    "gguf-q4_0": Type.Q4_0,
    "gguf-q4_1": Type.Q4_1,
    "gguf-q4_k_m": Type.Q4_K,
    "gguf-q5_k_m": Type.Q5_K,
}
FILE_TYPES = {
    "gguf-f16": gguf.LlamaFileType.MOSTLY_F16,
    "gguf-q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "gguf-q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "gguf-q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "gguf-q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "gguf-q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
}
_FOUR_BITS = ("gguf-q4_0", "gguf-q4_1")
_SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """The types of a file's tensors.

    Attributes:
        by_name: The type of each tensor, by its name in the file.
        fallbacks: The tensors whose rows did not fit into the blocks of the type that the mixture asks for.
    """

    by_name: Mapping[str, Type]
    fallbacks: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Return how many tensors have each type, the most frequent first."""
        return dict(Counter(tensor_type.name.lower() for tensor_type in self.by_name.values()).most_common())


def choose(shapes: Mapping[str, tuple[int, ...]], export_type: str, num_layers: int) -> TensorTypes:
    """Choose the type of every tensor, by its name in the file and its shape."""
    by_name, fallbacks = {}, []
    is_tied = OUTPUT not in shapes
    for name, shape in shapes.items():
        # Norms and biases stay in fp32: they are small, and sensitive to rounding.
        if len(shape) == 1:
            by_name[name] = Type.F32
            continue
        asked_type = _matrix_type(name, shape, export_type, num_layers, is_tied=is_tied)
        by_name[name] = _that_fits(asked_type, shape[-1])
        if by_name[name] != asked_type:
            fallbacks.append(name)
    return TensorTypes(by_name, tuple(fallbacks))


def _matrix_type(name: str, shape: tuple[int, ...], export_type: str, num_layers: int, *, is_tied: bool) -> Type:
    matrix_type = MATRIX_TYPES[export_type]
    if export_type in _FOUR_BITS:
        return Type.Q8_0 if name in (EMBEDDINGS, OUTPUT) else matrix_type
    if export_type not in gguf_mixtures.EXPORTS:
        return matrix_type

    # The output layer, which with tied embeddings is the embeddings, gets the most bits.
    if name == OUTPUT or (name == EMBEDDINGS and is_tied):
        return Type.Q6_K if _fits(matrix_type, shape[-1]) else Type.Q8_0
    if not (match := _LAYER.fullmatch(name)):
        return matrix_type
    layer, layer_name = int(match[1]), match[2]
    if layer_name in ("attn_v", "attn_qkv", "ffn_down") and _has_more_bits(layer, num_layers):
        return Type.Q6_K
    return matrix_type


def _has_more_bits(layer: int, num_layers: int) -> bool:
    """Return whether llama.cpp gives this layer more bits: the first and last eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _that_fits(tensor_type: Type, row_length: int) -> Type:
    """Return a type whose blocks a row fills: this one, that with smaller blocks, or f16."""
    candidates = (tensor_type, _SMALLER_BLOCKS.get(tensor_type, Type.F16), Type.F16)
    return next(candidate for candidate in candidates if _fits(candidate, row_length))


def _fits(tensor_type: Type, row_length: int) -> bool:
    block_length, _ = gguf.GGML_QUANT_SIZES[tensor_type]
    return bool(row_length % block_length == 0)
