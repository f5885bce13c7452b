"""Merge an adapter: W' = W + scaling * BA for every adapted weight, in fp32, stored as bf16.

With IA3, rows and columns of the weights are multiplied by their scales instead. Every other tensor stays as the base
has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from components.merge_adapter.ia3 import Ia3Adapter
from components.merge_adapter.lora import LoraAdapter
from qlora_retrain.core import progress
from qlora_retrain.core.errors import Diverged, IntegrityError, UsageError
from qlora_retrain.lm import adapter_start, base_formats, chat_format, loading, model_files
from qlora_retrain.lm.adapter_kind import IA3, adapter_kind
from qlora_retrain.lm.base_formats import BaseFormat
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES, copy_files
from qlora_retrain.lm.weight_files import SafetensorsFolder, TensorSpec, is_finite, write_safetensors
from qlora_retrain.lm.weight_names import names_in_model

# The merged model has a config.json of its own.
_COPIED_FILES = (*(pattern for pattern in TOKENIZER_FILES if pattern != "config.json"), chat_format.FILE)
_TENSORS_BETWEEN_UPDATES = 100
_TIED_MODULES = (
    "lm_head",
    "embed_tokens",
    "wte",
    "embed_in",
    "embed_out",
)  # transformers' names of the output layer and the embeddings


@dataclass(frozen=True, slots=True)
class MergeStats:
    """The statistics of a merge; `certificate.json` has these names.

    Attributes:
        tensors: The number of tensors that were written.
        modules: The number of them that the adapter changed.
        dequantized: The number of them that were read from `base_nf4`.
        weights_bytes: The size of all tensors.
    """

    tensors: int
    modules: int
    dequantized: int
    weights_bytes: int


def merge(
    base_model: Path, base_nf4: Path, adapter: Path, model: Path, *, dequantized: bool, max_shard_gib: float
) -> MergeStats:
    """Write the merged model as a plain transformers folder, one tensor in memory at a time.

    Args:
        base_model: The original model; everything that is not packed in `base_nf4` comes from here.
        base_nf4: The base that the adapter was trained over.
        adapter: The LoRA, DoRA or IA3 adapter; or all weights, where all trained, which are then the result.
        model: An empty folder, for the result.
        dequantized: Merge into the values of the packed weights instead of the original ones.
        max_shard_gib: The largest size of a file.

    Raises:
        UsageError: If the adapter is of another kind, or changes a weight that two layers share.
        IntegrityError: If a matrix of the adapter has no weight, or shapes differ, or the base is not finite.
        Diverged: If a sum overflows.
    """
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    if loading.has_all_weights(adapter):
        stats = _copy_trained(adapter, model, max_shard_gib)
        model_files.write_config(config, "bfloat16", model)
        copy_tokenizer(base_model, model)
        return stats
    # Such an adapter starts from what the packed base lacks, which the original base has.
    has_correction = not dequantized and adapter_start.corrects_base(base_nf4)
    correction = adapter_start.read(base_nf4) if has_correction else None
    with ExitStack() as stack:
        update: Ia3Adapter | LoraAdapter
        if adapter_kind(adapter) == IA3:
            update = stack.enter_context(Ia3Adapter(adapter))
        else:
            update = stack.enter_context(LoraAdapter(adapter, correction))
        whole_modules = [name.removesuffix(".weight") for name in getattr(update, "whole", ())]
        _refuse_tied_weights([*update.modules, *whole_modules], config)
        base = stack.enter_context(open_base(base_model, base_nf4, update.modules, dequantized=dequantized))
        module_by_weight = {name: module for module, name in base.weight_names.items()}
        module_by_bias = base.modules_by_bias() if isinstance(update, Ia3Adapter) else {}
        whole = base.by_file_name(update.whole) if isinstance(update, LoraAdapter) else {}
        changed_names = {*module_by_weight, *module_by_bias, *whole, *base.dequantized_names}

        # The files' headers come before the values, so every output type is decided before a tensor is read.
        specs = [_output_spec(base.original.spec(name), name in changed_names) for name in base.original.names]
        dtypes = {spec.name: spec.dtype for spec in specs}

        def make_tensor(name: str) -> torch.Tensor:
            tensor = base.tensor(name)
            if name in whole:
                tensor = _check_shape(update.tensor(whole[name]), tuple(tensor.shape), name, "adapter")
            elif name in module_by_weight:
                tensor = update.merge_into(module_by_weight[name], tensor)
            elif name in module_by_bias and isinstance(update, Ia3Adapter):
                tensor = update.merge_into_bias(module_by_bias[name], tensor)

            # Every tensor is checked here, also a copied one, so that a damaged base is noticed in any layer.
            tensor = tensor.to(dtypes[name])
            if tensor.is_floating_point() and not is_finite(tensor):
                raise _not_finite_error(name, base.original)
            return tensor

        def on_progress(done: int) -> None:
            if done % _TENSORS_BETWEEN_UPDATES == 0 or done == len(specs):
                progress.update("merging", done, len(specs))

        weights_bytes = write_safetensors(model, specs, make_tensor, max_shard_gib, on_progress)
        stats = MergeStats(len(specs), len(module_by_weight), len(base.dequantized_names), weights_bytes)
    model_files.write_config(config, "bfloat16", model)
    copy_tokenizer(base_model, model)
    return stats


def _copy_trained(adapter: Path, model: Path, max_shard_gib: float) -> MergeStats:
    """Write the weights of a training without an adapter (`train.method: full`) as they are: nothing is merged."""
    with SafetensorsFolder(adapter) as trained:

        def make_tensor(name: str) -> torch.Tensor:
            tensor = trained.tensor(name)
            if tensor.is_floating_point() and not is_finite(tensor):
                raise Diverged(f"adapter: {name} holds numbers that are not finite; train with a lower learning rate")
            return tensor

        specs = [trained.spec(name) for name in trained.names]
        weights_bytes = write_safetensors(model, specs, make_tensor, max_shard_gib)
    return MergeStats(len(specs), len(specs), 0, weights_bytes)


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """The weights that an adapter is merged into, read one at a time.

    Attributes:
        original: The files of the 16-bit base.
        nf4: Those of `base_nf4`.
        base_format: The format of the latter.
        model_names: By the name of a tensor in `original`: that in the model, which `nf4` uses.
        weight_names: By the name of an adapted module: that of its weight in `original`.
        dequantized_names: The names of the tensors that are taken from `nf4`.
    """

    original: SafetensorsFolder
    nf4: SafetensorsFolder
    base_format: BaseFormat
    model_names: dict[str, str]
    weight_names: dict[str, str]
    dequantized_names: frozenset[str]

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of `original`, from the 4-bit base where its values are merged into."""
        if name not in self.dequantized_names:
            return self.original.tensor(name)
        # The shapes differ where base_nf4 was made from another base.
        values = self.base_format.unpack(self.model_names[name], self.nf4)
        return _check_shape(values, self.original.spec(name).shape, name)

    def by_file_name(self, tensors: Mapping[str, str]) -> dict[str, str]:
        """Return values by the names of weights in `original`, from those in the model.

        Raises:
            IntegrityError: If `original` has no such weight.
        """
        file_names = {model_name: name for name, model_name in self.model_names.items()}
        # The output layer of GPT-NeoX has another name in its files than in the model.
        if "embed_out.weight" in file_names:
            file_names.setdefault("lm_head.weight", file_names["embed_out.weight"])
        if missing := sorted(tensors.keys() - file_names.keys()):
            raise IntegrityError(
                f"adapter: the base has no weight {missing[0]}, which learnt whole; it was trained over another model"
            )
        return {file_names[name]: value for name, value in tensors.items()}

    def modules_by_bias(self) -> dict[str, str]:
        """Return the adapted modules that have a bias, by its name in `original`."""
        file_names = {model_name: name for name, model_name in self.model_names.items()}
        names = {module: file_names.get(f"{module}.bias") for module in self.weight_names}
        return {name: module for module, name in names.items() if name is not None}

    def module_weight(self, module: str) -> torch.Tensor:
        """Read the weight (out, in) of an adapted module."""
        return self.tensor(self.weight_names[module])


@contextmanager
def open_base(base_model: Path, base_nf4: Path, modules: Sequence[str], *, dequantized: bool) -> Iterator[BaseWeights]:
    """Open the files of the base, for an adapter of these modules.

    Raises:
        IntegrityError: If a module has no weight in them.
    """
    with SafetensorsFolder(base_model) as base, SafetensorsFolder(base_nf4) as nf4:
        model_names = names_in_model(base.names, {*nf4.names, *(f"{module}.weight" for module in modules)})
        base_names = {model_name: name for name, model_name in model_names.items()}
        if unmatched := [module for module in modules if f"{module}.weight" not in base_names]:
            raise IntegrityError(
                f"adapter: {len(unmatched)} of {len(modules)} modules have no weight in the base, e.g. "
                f"{unmatched[0]}; it was trained over another model, or this family stores its weights under other "
                "names"
            )
        base_format = base_formats.from_folder(base_nf4)
        packed_names = base_format.packed_names(nf4.names) if dequantized else set()
        yield BaseWeights(
            original=base,
            nf4=nf4,
            base_format=base_format,
            model_names=model_names,
            weight_names={module: base_names[f"{module}.weight"] for module in modules},
            dequantized_names=frozenset(name for name in base.names if model_names[name] in packed_names),
        )


def copy_tokenizer(base_model: Path, folder: Path) -> None:
    """Copy the tokenizer, the chat template and the generation config."""
    copy_files(base_model, folder, _COPIED_FILES)


def _refuse_tied_weights(modules: Sequence[str], config: dict[str, Any]) -> None:
    """Refuse to merge into a weight that embeddings and output layer share, as both would change."""
    # With tied embeddings the file has one tensor for both layers, and loading ties them again.
    for module in modules:
        if config.get("tie_word_embeddings") and module.rsplit(".", 1)[-1] in _TIED_MODULES:
            raise UsageError(
                f"adapter: it changes {module}, whose weight embeddings and output layer share; train without it"
            )


def _output_spec(spec: TensorSpec, is_changed: bool) -> TensorSpec:
    """Return how a tensor is stored: in bf16 if it changes or is wider than 16 bits, else with its own bytes."""
    is_wide = spec.dtype.is_floating_point and spec.dtype.itemsize > torch.bfloat16.itemsize
    return replace(spec, dtype=torch.bfloat16) if is_changed or is_wide else spec


def _not_finite_error(name: str, base: SafetensorsFolder) -> Exception:
    # A damaged base is a fault of the input (13); an overflow of the sum is a fault of the training (14).
    if not is_finite(base.tensor(name)):
        return IntegrityError(f"base_model: {name} holds numbers that are not finite")
    return Diverged(f"adapter: merging it into {name} gives numbers that are not finite")


def _check_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str, label: str = "base_nf4") -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise IntegrityError(f"{name}: the shape is {shape} in base_model, but {tuple(tensor.shape)} in {label}")
    return tensor
