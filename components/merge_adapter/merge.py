"""W' = W + scale * BA for every adapted weight, in fp32, stored as bf16; everything else as the base has it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from components.merge_adapter.lora import Adapter
from components.merge_adapter.weights import Weights, unused, write
from qlora_retrain import progress
from qlora_retrain.errors import Diverged, IntegrityError
from qlora_retrain.graph import TOKENIZER_FILES

_COPIED = (*(pattern for pattern in TOKENIZER_FILES if pattern != "config.json"), "generation_config.json")
_TENSORS_BETWEEN_UPDATES = 100


@dataclass(frozen=True, slots=True)
class Merged:
    """What was built."""

    tensors: int
    modules: int
    dequantized: int
    weights_bytes: int


def merge(
    base_model: Path, base_nf4: Path, adapter: Path, model: Path, *, dequantized: bool, max_shard_gib: float
) -> Merged:
    """Write the merged model as a plain transformers folder.

    Args:
        base_model: The original model; everything that is not 4-bit in `base_nf4` comes from here.
        base_nf4: The form that the adapter was trained over.
        adapter: The LoRA adapter.
        model: An empty folder.
        dequantized: Add to the dequantized 4-bit weights instead of the original ones.
        max_shard_gib: Size of a file at most.

    Raises:
        UsageError: If the adapter is not plain LoRA.
        IntegrityError: If a matrix of the adapter has no weight, or shapes differ, or the base is not finite.
        Diverged: If a sum overflows.
    """
    found = Adapter(adapter)
    rounded = 0
    with Weights(base_model) as base, Weights(base_nf4) as packed:
        if lost := unused(found.modules, base):
            raise IntegrityError(
                f"adapter: {len(lost)} of {len(found.modules)} modules have no weight in the base, e.g. {lost[0]}; "
                "it was trained over another model"
            )
        adapted = {f"{module}.weight": module for module in found.modules}

        def make(name: str) -> torch.Tensor:
            nonlocal rounded
            tensor = base.tensor(name)
            if not tensor.is_floating_point():
                return tensor
            if not torch.isfinite(tensor).all():
                raise IntegrityError(f"base_model: {name} holds numbers that are not finite")
            if dequantized and packed.quantized(name):
                tensor, rounded = _fitting(packed.dequantized(name), tensor, name), rounded + 1
            if name in adapted:
                tensor = tensor.float() + _fitting(found.delta(adapted[name]), tensor, name)
            stored = tensor.to(torch.bfloat16)
            if not torch.isfinite(stored).all():
                raise Diverged(f"adapter: merged into {name} it gives numbers that are not finite")
            return stored

        def tick(done: int) -> None:
            if done % _TENSORS_BETWEEN_UPDATES == 0 or done == len(base.names):
                progress.update("merging", done, len(base.names))

        weights_bytes = write(model, base, make, max_shard_gib, tick)
        tensors = len(base.names)
    _write_config(base_model, model)
    _copy_tokenizer(base_model, model)
    for path in model.iterdir():
        path.chmod(0o644)  # safetensors writes 0600 on some platforms; whoever pulls must be able to read
    return Merged(tensors, len(found.modules), rounded, weights_bytes)


def _fitting(tensor: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.shape != like.shape:
        raise IntegrityError(f"{name}: is {tuple(like.shape)} in the base, {tuple(tensor.shape)} to be merged into it")
    return tensor


def _write_config(base_model: Path, model: Path) -> None:
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)  # the older name of `dtype`; two that differ would be worse than one
    config["dtype"] = "bfloat16"
    text = json.dumps(config, indent=2, sort_keys=True)
    (model / "config.json").write_text(text + "\n", encoding="utf-8")


def _copy_tokenizer(base_model: Path, model: Path) -> None:
    for path in sorted({path for pattern in _COPIED for path in base_model.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, model / path.name)
