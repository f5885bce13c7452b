"""The adapter as numbers: for every module the matrix that is added to its weight, read without PEFT or a model.

Reads `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them. Refuses (12) what is not plain LoRA on
linear layers, (13) an adapter whose tensors do not belong together, (14) one with numbers that are not finite.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_retrain.errors import Diverged, IntegrityError, UsageError

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings of PEFT's LoRA that change what is added, and the value under which they change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "use_bdlora": (False, None),
}


class Adapter:
    """A trained LoRA adapter.

    Attributes:
        modules: The names of the linear layers that it changes, sorted.
    """

    def __init__(self, folder: Path) -> None:
        self.config = _config(folder / "adapter_config.json")
        self.sides = _sides(folder / "adapter_model.safetensors")
        self.modules = sorted(self.sides)

    def delta(self, module: str) -> torch.Tensor:
        """What is added to a module's weight: scale * B @ A, fp32, (out features, in features)."""
        a, b = (self.sides[module][side].float() for side in "AB")
        product: torch.Tensor = self.scale(module) * (b @ a)
        return product

    def scale(self, module: str) -> float:
        """alpha/rank, or alpha/sqrt(rank) with rsLoRA, after the module's own rank and alpha if it has them."""
        rank = int(_of(module, self.config.get("rank_pattern"), self.config["r"]))
        alpha = float(_of(module, self.config.get("alpha_pattern"), self.config["lora_alpha"]))
        a, b = self.sides[module]["A"], self.sides[module]["B"]
        if a.shape[0] != rank or b.shape[1] != rank:
            raise IntegrityError(
                f"adapter: {module}: adapter_config.json says rank {rank}, its matrices are "
                f"{tuple(b.shape)} and {tuple(a.shape)}"
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UsageError(f"adapter: is of type {config.get('peft_type')}; only LORA can be merged")
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise UsageError(f"adapter: {name}={config[name]!r} cannot be merged yet; train without it")
    return config


def _sides(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                match = _KEY.fullmatch(key)
                if not match:
                    raise UsageError(f"adapter: tensor {key} is not plain LoRA on a linear layer; cannot be merged yet")
                tensor = file.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise Diverged(f"adapter: {key} holds numbers that are not finite; train with a lower rate")
                sides.setdefault(match["module"], {})[match["side"]] = tensor
    except SafetensorError as error:
        raise IntegrityError(f"adapter: {path.name} is damaged: {error}") from error
    if not sides:
        raise IntegrityError(f"adapter: {path.name} holds no tensor")
    if lone := sorted(module for module, found in sides.items() if len(found) != 2):
        raise IntegrityError(f"adapter: {lone[0]} has only one of its two matrices")
    return sides


def _of(module: str, pattern: dict[str, Any] | None, default: Any) -> Any:
    """The first pattern that names the module, as PEFT matches them: a regular expression at the name's end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
