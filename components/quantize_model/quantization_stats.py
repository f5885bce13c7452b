"""Measure the cost of a base format: how much of a model is in linear layers, and the error of each kind of layer."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Embedding, Linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import base_formats
from qlora_retrain.lm.model_files import weight_paths
from qlora_retrain.lm.weight_names import names_in_model

_CHUNK_NUMBERS = 1 << 18  # a statistic's temporaries in fp32 then take 3 MiB, whatever the tensor


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model is in linear layers, its embeddings and its output layer left aside.

    Attributes:
        fraction: The weights of linear layers as a fraction of all weights; 0 where there are none.
        largest_rest: The largest tensor outside them, with its module's class; None where there is none.
        is_rest_linear: Whether that is a linear layer, too, which the format leaves in 16 bits.
    """

    fraction: float
    largest_rest: str | None
    is_rest_linear: bool


def coverage(model: PreTrainedModel, layer_type: type[Linear]) -> Coverage:
    """Count the weights of a model by whether a layer of this type has them; they need not be loaded yet."""
    # Tied weights are one tensor under two names, so tensors are told apart by identity.
    aside = [m for m in model.modules() if isinstance(m, Embedding)] + [model.get_output_embeddings()]
    seen_ids = {id(parameter) for module in aside if module is not None for parameter in module.parameters()}

    quantized = total = largest = 0
    largest_rest, is_rest_linear = None, False
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen_ids:
                continue
            seen_ids.add(id(parameter))
            if isinstance(module, layer_type) and name == "weight":
                # The layer's own numbers, since a packed tensor has two weights in each byte.
                size = module.in_features * module.out_features
                quantized += size
            else:
                size = parameter.numel()
                if size > largest:
                    largest, largest_rest = size, f"{module_name}.{name} ({type(module).__name__})"
                    is_rest_linear = type(module) is Linear  # a family's own class is not packed at any width
            total += size
    return Coverage(quantized / total if total else 0.0, largest_rest, is_rest_linear)


def sufficient_coverage(model: PreTrainedModel, layer_type: type[Linear], min_fraction: float) -> Coverage:
    """Return how much of the model is in linear layers; its weights need not be loaded yet.

    Raises:
        UsageError: If it is less than `min_fraction`.
    """
    # bitsandbytes silently leaves layers other than Linear in 16 bits. LoRA does not reach these either.
    result = coverage(model, layer_type)
    if not result.fraction and not result.is_rest_linear:
        raise UsageError(f"base_model: {type(model).__name__} has no linear layer that could be quantized or adapted")
    if result.fraction < min_fraction or not result.fraction:
        scope, consequence = "", "and no adapter would reach it"
        remedy = "Choose another base, or lower the setting if that is what you want"
        if result.is_rest_linear:
            scope, consequence = " that quantize.format packs", "since its width does not fit it"
            remedy = "Set quantize.format: nf4, which packs every width"
            remedy += ", or lower the setting if that is what you want" if result.fraction else ""
        raise UsageError(
            f"base_model: only {result.fraction:.1%} of the weights outside embeddings and head are in linear layers"
            f"{scope}, and quantize.min_quantized_fraction is {min_fraction:g}. The largest tensor outside of them is "
            f"{result.largest_rest}: it would stay in 16 bits, {consequence}. {remedy}"
        )
    return result


class ErrorSums:
    """The squared norms of weights and of their errors, by kind of layer and of all."""

    def __init__(self) -> None:
        # Squares are summed over the layers of a kind, so that the root of their ratio is the error of all of them.
        self.squared_errors: dict[str, float] = defaultdict(float)
        self.squared_norms: dict[str, float] = defaultdict(float)

    def add(self, name: str, original: Tensor, stored: Tensor) -> None:
        """Add a weight, e.g. `model.layers.0.mlp.up_proj.weight`, as it was and as its stored form has it."""
        norm, error = squared_norms(original, stored)
        for kind in (name.split(".")[-2], "all"):
            self.squared_errors[kind] += error
            self.squared_norms[kind] += norm

    def errors(self) -> dict[str, float]:
        """Return the relative error of each kind, by name."""
        return {
            kind: (self.squared_errors[kind] / norm) ** 0.5 if norm else 0.0
            for kind, norm in sorted(self.squared_norms.items())
        }


def layer_errors(model: PreTrainedModel, layer_type: type[Linear], base_model: Path) -> dict[str, float]:
    """Return the relative error of the packed weights by kind of layer, and over "all" of them.

    The error is |W - W4| / |W| (Frobenius norm).

    Raises:
        UsageError: If a packed layer has no weight of its own in the base's files.
    """
    sums = ErrorSums()
    with ExitStack() as stack:
        files: dict[str, Any] = {}  # the open file that holds each tensor
        for path in weight_paths(base_model):
            file = stack.enter_context(safe_open(path, "pt"))
            files |= dict.fromkeys(file.keys(), file)
        layers = {f"{n}.weight": module for n, module in model.named_modules() if isinstance(module, layer_type)}
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
            sums.add(name, original, base_formats.layer_weight(module))
    return sums.errors()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(_CHUNK_NUMBERS))


def _is_stored_alike(module: Any, files: dict[str, Any], name: str | None) -> bool:
    """Return whether a file holds the layer's own weight, (out, in)."""
    if name is None or issubclass(getattr(module, "source_cls", Linear), Conv1D):
        return False
    return bool(files[name].get_slice(name).get_shape() == [module.out_features, module.in_features])


def squared_norms(original: Tensor, stored: Tensor) -> tuple[float, float]:
    """Return |W|^2 and |W - W4|^2, in chunks: the fp32 forms of whole tensors take 4 times the 16-bit size."""
    norm = error = 0.0
    parts = (tensor.flatten().split(_CHUNK_NUMBERS) for tensor in (original, stored))
    for part, stored_part in zip(*parts, strict=True):
        numbers = part.float()
        norm += float(vector_norm(numbers)) ** 2
        error += float(vector_norm(stored_part.float().sub_(numbers))) ** 2
    return norm, error
