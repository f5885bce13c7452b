"""Measure the cost of quantization: bits per weight of the stored tensors, and the error of each kind of layer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Embedding
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.four_bit import BLOCK_SIZE, SCALES_PER_GROUP
from qlora_retrain.lm.model_files import weight_paths
from qlora_retrain.lm.weight_names import names_in_model

_CHUNK_NUMBERS = 1 << 18  # a statistic's temporaries in fp32 then take 3 MiB, whatever the tensor

# Stored once per tensor whatever its size: the levels of both codes, and a small JSON with shapes and the scales' mean.
FIXED_SIZE_PARTS = ("quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, slots=True)
class StorageBits:
    """The storage of the quantized layers.

    Attributes:
        weights: The number of quantized weights.
        per_weight: The bits that grow with the layer: 4-bit codes, their scales, the scales' scales. They are checked
            against `expected_bits`.
        per_weight_with_tables: The same plus the tables of fixed size (about 1.2 KB per tensor). The tables are 0.5 %
            of a model of 100 M weights and negligible in larger ones. This number is shown and not checked.
    """

    weights: int
    per_weight: float
    per_weight_with_tables: float


def expected_bits(double_quant: bool) -> float:
    """Return the bits per weight by the method's arithmetic: 4.127 with double quantization, 4.5 without."""
    # With double quantization, scales have 8 bits and share an fp32 scale per group; without it they are fp32.
    return 4 + (8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * SCALES_PER_GROUP) if double_quant else 32 / BLOCK_SIZE)


def stored_bits(folder: Path) -> StorageBits:
    """Add up the bytes of every stored tensor that belongs to a quantized layer."""
    sizes = dict(_stored_tensors(folder))
    layers = [name.removesuffix(".absmax") for name in sizes if name.endswith(".weight.absmax")]
    weights = growing_bytes = table_bytes = 0
    for layer in layers:
        weights += 2 * sizes[layer]  # two 4-bit codes per byte
        growing_bytes += sizes[layer] + sizes[f"{layer}.absmax"] + sizes.get(f"{layer}.nested_absmax", 0)
        table_bytes += sum(sizes.get(f"{layer}.{part}", 0) for part in FIXED_SIZE_PARTS)

    if not weights:
        return StorageBits(0, 0.0, 0.0)
    return StorageBits(weights, 8 * growing_bytes / weights, 8 * (growing_bytes + table_bytes) / weights)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model became 4-bit, its embeddings and its output layer left aside.

    Attributes:
        fraction: The quantized weights as a fraction of all weights; 0 where there are none.
        largest_rest: The largest tensor that stayed in 16 bits, with its module's class; None where there is none.
    """

    fraction: float
    largest_rest: str | None


def coverage(model: PreTrainedModel) -> Coverage:
    """Count the weights of a model by whether bitsandbytes packs them; they need not be loaded yet."""
    # Tied weights are one tensor under two names, so tensors are told apart by identity.
    aside = [m for m in model.modules() if isinstance(m, Embedding)] + [model.get_output_embeddings()]
    seen_ids = {id(parameter) for module in aside if module is not None for parameter in module.parameters()}

    quantized = total = largest = 0
    largest_rest = None
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen_ids:
                continue
            seen_ids.add(id(parameter))
            if isinstance(module, Linear4bit) and name == "weight":
                # The layer's own numbers, since a packed tensor has two weights in each byte.
                size = module.in_features * module.out_features
                quantized += size
            else:
                size = parameter.numel()
                if size > largest:
                    largest, largest_rest = size, f"{module_name}.{name} ({type(module).__name__})"
            total += size
    return Coverage(quantized / total if total else 0.0, largest_rest)


def sufficient_coverage(model: PreTrainedModel, min_fraction: float) -> Coverage:
    """Return how much of the model becomes 4-bit; its weights need not be loaded yet.

    Raises:
        UsageError: If it is less than `min_fraction`.
    """
    # bitsandbytes silently leaves layers other than Linear in 16 bits. LoRA does not reach these either.
    if not any(isinstance(module, Linear4bit) for module in model.modules()):
        raise UsageError(f"base_model: {type(model).__name__} has no linear layer that bitsandbytes can quantize")
    result = coverage(model)
    if result.fraction < min_fraction:
        raise UsageError(
            f"base_model: only {result.fraction:.1%} of the weights outside embeddings and head would become 4-bit, "
            f"and quantize.min_quantized_fraction is {min_fraction:g}. The largest that stays in 16 bits is "
            f"{result.largest_rest}, which is no Linear layer: no adapter would reach it either. Choose another base, "
            "or lower the setting if that is what you want"
        )
    return result


def layer_errors(model: PreTrainedModel, base_model: Path) -> dict[str, float]:
    """Return the relative error of the 4-bit weights by kind of layer, and over "all" of them.

    The error is |W - W4| / |W| (Frobenius norm).

    Raises:
        UsageError: If a 4-bit layer has no weight of its own in the base's files.
    """
    # Squares are summed over the layers of a kind, so that the square root of their ratio is the error of all of them.
    squared_errors: dict[str, float] = defaultdict(float)
    squared_norms: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        files: dict[str, Any] = {}  # the open file that holds each tensor
        for path in weight_paths(base_model):
            file = stack.enter_context(safe_open(path, "pt"))
            files |= dict.fromkeys(file.keys(), file)
        layers = {f"{n}.weight": module for n, module in model.named_modules() if isinstance(module, Linear4bit)}
        file_names = {model_name: name for name, model_name in names_in_model(files, layers).items()}
        # The merge writes the adapter into these weights, hours later.
        if missing := sorted(
            name for name in layers if not _is_stored_alike(layers[name], files, file_names.get(name))
        ):
            raise UsageError(
                f"base_model: {len(missing)} of {len(layers)} quantized weights of {type(model).__name__} have "
                f"other names or another form in its files, e.g. {missing[0]}, so no adapter could be merged into "
                "them; choose another base"
            )

        for name, module in layers.items():
            original = files[file_names[name]].get_tensor(file_names[name])
            stored = dequantize_4bit(module.weight.data, module.weight.quant_state)
            norm, error = _squared_norms(original, stored)
            for kind in (name.split(".")[-2], "all"):
                squared_errors[kind] += error
                squared_norms[kind] += norm
    return {
        kind: (squared_errors[kind] / squared_norms[kind]) ** 0.5 if squared_norms[kind] else 0.0
        for kind in sorted(squared_norms)
    }


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(_CHUNK_NUMBERS))


def _is_stored_alike(module: Linear4bit, files: dict[str, Any], name: str | None) -> bool:
    """Return whether a file holds the layer's own weight, (out, in)."""
    if name is None or issubclass(module.source_cls, Conv1D):
        return False
    return bool(files[name].get_slice(name).get_shape() == [module.out_features, module.in_features])


def _squared_norms(original: Tensor, stored: Tensor) -> tuple[float, float]:
    """Return |W|^2 and |W - W4|^2, in chunks: the fp32 forms of whole tensors take 4 times the 16-bit size."""
    norm = error = 0.0
    parts = (tensor.flatten().split(_CHUNK_NUMBERS) for tensor in (original, stored))
    for part, stored_part in zip(*parts, strict=True):
        numbers = part.float()
        norm += float(vector_norm(numbers)) ** 2
        error += float(vector_norm(stored_part.float().sub_(numbers))) ** 2
    return norm, error


def _stored_tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield every stored tensor's name and bytes, from the files' headers alone."""
    for path in weight_paths(folder):
        # The header's length in 8 bytes, then the header, as the safetensors documentation has it.
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, end - begin
