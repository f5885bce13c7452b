"""Write the merged model as one GGUF file, tensor by tensor, for llama.cpp and programs built on it; and read it again.

Reads a plain transformers folder; writes with the `gguf` package. Refuses (12) architectures, settings and tokenizers
that GGUF has no place for: a file with a wrong name loads but answers nonsense.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from components.merge_adapter import gguf_blocks, gguf_metadata, gguf_tokenizer, gguf_types
from components.merge_adapter.gguf_layout import Layout
from components.merge_adapter.gguf_types import TensorTypes
from components.merge_adapter.moved_minima import Blocks
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm import gguf_families, gguf_mixtures, gguf_names, loading
from qlora_retrain.lm.weight_files import SafetensorsFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_unsupported(base_model: Path, export_types: list[str]) -> None:
    """Raise `UsageError` where the model cannot be written as GGUF; of the weights only the names are read."""
    gguf_mixtures.refuse_without_quantizer(export_types)
    # The plan checks only the files; here the config and the tokenizer are checked as transformers loads them.
    layout = Layout.from_folder(base_model)
    tokenizer = gguf_tokenizer.backend_tokenizer(base_model)
    gguf_names.pre_tokenizer_name(tokenizer)
    gguf_names.refuse_tokens_without_embedding(layout.config, tokenizer)
    with SafetensorsFolder(base_model) as weights:
        for name in weights.names:
            layout.gguf_name(name)


def write_gguf(model: Path, path: Path, export_type: str, blocks: Blocks = lambda name: None) -> list[str]:
    """Write the file, and return what its user must know of it, in one sentence each.

    Args:
        model: The merged model, a plain transformers folder.
        path: The file to write.
        export_type: One of `gguf_types.MATRIX_TYPES`; vectors are stored in fp32. With 4 bits, embeddings and output
            layer are stored as q8_0, since llama.cpp's quantizer also gives them more bits than others.
        blocks: Returns a matrix of the model as it is stored in a file of this type, where it is in 4 bits already.

    Raises:
        UsageError: If the family, the tokenizer or a tensor has no name in GGUF.
        IntegrityError: If a number, or the scale of a block, is too large for f16.
    """
    layout = Layout.from_folder(model)
    writer = gguf.GGUFWriter(None, layout.family.arch)
    gguf_metadata.add_settings(writer, layout, gguf_types.FILE_TYPES[export_type])
    notes = gguf_tokenizer.add_tokenizer(writer, model, layout.config["vocab_size"])
    quantize = gguf_blocks.quantize_by_llama_cpp if export_type in gguf_mixtures.EXPORTS else gguf_blocks.quantize

    with SafetensorsFolder(model) as weights, contextlib.closing(writer):
        # The header lists every tensor with its size, so it is complete before the first value is computed.
        names = [name for name in weights.names if layout.is_stored(name)]
        rotary = layout.rotary_tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in rotary.items()}
        shapes |= {layout.gguf_name(name): weights.spec(name).shape for name in names}
        types = gguf_types.choose(shapes, export_type, layout.config["num_hidden_layers"])
        for gguf_name, shape in shapes.items():
            _add_tensor_info(writer, gguf_name, shape, types.by_name[gguf_name])
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        for tensor in rotary.values():
            writer.write_tensor_data(gguf_blocks.quantize(tensor, gguf.GGMLQuantizationType.F32))
        for name in names:
            tensor_type = types.by_name[layout.gguf_name(name)]
            packed = blocks(name)
            if packed is None:
                stored = quantize(layout.to_gguf(name, weights.tensor(name).float()), tensor_type)
            else:
                stored = layout.permute_rotary(name, packed, inverse=False).numpy()
            if not gguf_blocks.is_finite(stored, tensor_type):
                raise IntegrityError(
                    f"merge.exports: {export_type}: {name} holds numbers too large for f16; leave this export out"
                )
            writer.write_tensor_data(stored)
    return [*_type_notes(types), *gguf_families.reading_differences(layout.config), *notes]


def load_gguf(model: Path, path: Path, **load_options: Any) -> PreTrainedModel:
    """Load the weights of a GGUF file, dequantized, into the model that it was made of.

    Settings and code are those of the model's folder, since transformers does not read every setting of every family
    from a GGUF file.

    Raises:
        IntegrityError: If a weight is missing in the file, or has another shape.
    """
    layout, loaded = Layout.from_folder(model), loading.load_base(model, **load_options)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with SafetensorsFolder(model) as weights:
        names = [name for name in weights.names if layout.is_stored(name)]

    parameters = dict(loaded.named_parameters())
    for name in names:
        gguf_name, parameter = layout.gguf_name(name), parameters[name]
        if gguf_name not in stored:
            raise IntegrityError(f"{path.name}: has no tensor {gguf_name}; have the file made again")
        tensor = stored[gguf_name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # What is in fp32 already is the file itself, which cannot be written to.
        values = values if values.flags.writeable else values.copy()
        with torch.no_grad():
            parameter.copy_(layout.from_gguf(name, torch.from_numpy(values).reshape(parameter.shape)))
    return loaded


def _type_notes(types: TensorTypes) -> list[str]:
    """Say which types the tensors have, where a mixture chose them."""
    counts = ", ".join(f"{count} in {name}" for name, count in types.counts.items())
    if not types.fallbacks:
        return [counts]
    others = sorted({types.by_name[name].name.lower() for name in types.fallbacks})
    return [
        f"{counts}; {len(types.fallbacks)} of {len(types.by_name)} tensors fell back to {', '.join(others)}, since "
        "their rows do not fill whole blocks of the type that was asked for"
    ]


def _add_tensor_info(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], tensor_type: gguf.GGMLQuantizationType
) -> None:
    byte_shape = gguf.quant_shape_to_byte_shape(shape, tensor_type)
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=tensor_type)
