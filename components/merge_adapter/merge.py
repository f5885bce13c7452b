"""W' = W + scale * BA for every adapted weight, in fp32, stored as bf16; everything else as the base has it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from components.merge_adapter.lora import Adapter
from components.merge_adapter.weights import Spec, Weights, finite, write
from qlora_retrain.core import progress
from qlora_retrain.core.errors import Diverged, IntegrityError, UsageError
from qlora_retrain.core.graph import TOKENIZER_FILES

_COPIED = (*(pattern for pattern in TOKENIZER_FILES if pattern != "config.json"), "generation_config.json")
_TENSORS_BETWEEN_UPDATES = 100
_TIED = ("lm_head", "embed_tokens")  # the names that transformers gives the two ends of a model


@dataclass(frozen=True, slots=True)
class Merged:
    """What was built.

    Attributes:
        tensors: How many were written.
        modules: How many of them the adapter changed.
        dequantized: How many began as their 4-bit values.
        weights_bytes: Of all tensors.
    """

    tensors: int
    modules: int
    dequantized: int
    weights_bytes: int


def merge(
    base_model: Path, base_nf4: Path, adapter: Path, model: Path, *, dequantized: bool, max_shard_gib: float
) -> Merged:
    """Write the merged model as a plain transformers folder, one tensor in memory at a time.

    Args:
        base_model: The original model; everything that is not 4-bit in `base_nf4` comes from here.
        base_nf4: The form that the adapter was trained over.
        adapter: The LoRA or DoRA adapter.
        model: An empty folder.
        dequantized: Add to the dequantized 4-bit weights instead of the original ones.
        max_shard_gib: Size of a file at most.

    Raises:
        UsageError: If the adapter is of another kind, or changes a weight that two layers share.
        IntegrityError: If a matrix of the adapter has no weight, or shapes differ, or the base is not finite.
        Diverged: If a sum overflows.
    """
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    with Weights(base_model) as base, Weights(base_nf4) as packed, Adapter(adapter) as trained:
        _refuse_shared(trained, config)
        if lost := [module for module in trained.modules if f"{module}.weight" not in base]:
            raise IntegrityError(
                f"adapter: {len(lost)} of {len(trained.modules)} modules have no weight in the base, e.g. {lost[0]}; "
                "it was trained over another model, or this family stores its weights under other names"
            )
        adapted = {f"{module}.weight": module for module in trained.modules}
        rounded = {name for name in base.names if dequantized and packed.quantized(name)}
        specs = [_stored(base.spec(name), name in adapted or name in rounded) for name in base.names]
        dtypes = {spec.name: spec.dtype for spec in specs}

        def make(name: str) -> torch.Tensor:
            if name in rounded:
                tensor = _fitting(packed.dequantized(name), base.spec(name).shape, name)
            else:
                tensor = base.tensor(name)
            if name in adapted:
                tensor = trained.merged(adapted[name], tensor)
            tensor = tensor.to(dtypes[name])
            if tensor.is_floating_point() and not finite(tensor):
                raise _not_finite(name, base)
            return tensor

        def tick(done: int) -> None:
            if done % _TENSORS_BETWEEN_UPDATES == 0 or done == len(specs):
                progress.update("merging", done, len(specs))

        weights_bytes = write(model, specs, make, max_shard_gib, tick)
        built = Merged(len(specs), len(adapted), len(rounded), weights_bytes)
    _write_config(config, model)
    copy_tokenizer(base_model, model)
    return built


def copy_tokenizer(base_model: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config."""
    for path in sorted({path for pattern in _COPIED for path in base_model.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)


def _refuse_shared(trained: Adapter, config: dict[str, Any]) -> None:
    """Raise where an adapted layer shares its weight with another: a merge would change both, or be lost in loading."""
    for module in trained.modules:
        if config.get("tie_word_embeddings") and module.rsplit(".", 1)[-1] in _TIED:
            raise UsageError(
                f"adapter: changes {module}, whose weight embeddings and output layer share; train without it"
            )


def _stored(spec: Spec, changed: bool) -> Spec:
    """What changes, and what is wider than 16 bits, is stored as bf16; all else keeps its bytes."""
    wide = spec.dtype.is_floating_point and spec.dtype.itemsize > torch.bfloat16.itemsize
    return replace(spec, dtype=torch.bfloat16) if changed or wide else spec


def _not_finite(name: str, base: Weights) -> Exception:
    if not finite(base.tensor(name)):
        return IntegrityError(f"base_model: {name} holds numbers that are not finite")
    return Diverged(f"adapter: merged into {name} it gives numbers that are not finite")


def _fitting(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise IntegrityError(f"{name}: is {shape} in the base, {tuple(tensor.shape)} in its 4-bit form")
    return tensor


def _write_config(base: dict[str, Any], model: Path) -> None:
    config = {name: value for name, value in base.items() if name not in ("quantization_config", "torch_dtype")}
    config["dtype"] = "bfloat16"  # `torch_dtype` is its older name; two that differ would be worse than one
    text = json.dumps(config, indent=2, sort_keys=True)
    (model / "config.json").write_text(text + "\n", encoding="utf-8")
