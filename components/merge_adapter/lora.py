"""The adapter as numbers: what it makes of each weight that it changes, read without PEFT or a model.

Reads `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them. Refuses (12) what is not LoRA or DoRA
on linear layers, (13) an adapter whose tensors do not belong together, (14) one with numbers that are not finite.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from components.merge_adapter.weights import Weights, finite
from qlora_retrain.core.errors import Diverged, IntegrityError, UsageError

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|magnitude_vector(?:\.weight)?)")
_MAGNITUDE = "magnitude"
_AT_ONCE = 2**17  # weights widened to fp32 at a time: 0.5 MB, which stays in a core's cache
# Settings of PEFT's LoRA that change what is added, and the values under which they change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
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


class Adapter(Weights):
    """A trained LoRA or DoRA adapter; open it with `with`. Its matrices stay in their file until they are needed.

    Attributes:
        config: `adapter_config.json`.
        modules: The names of the linear layers that it changes, sorted.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single="adapter_model.safetensors")
        self.config = _config(folder / "adapter_config.json")
        self.modules: list[str] = []
        self._keys: dict[str, dict[str, str]] = {}  # by module: the key of A, B and the magnitude

    def __enter__(self) -> Adapter:
        super().__enter__()
        for key in self.names:
            match = _KEY.fullmatch(key)
            if not match:
                raise UsageError(f"adapter: tensor {key} is not LoRA on a linear layer; cannot be merged yet")
            if not finite(self.tensor(key)):
                raise Diverged(f"adapter: {key} holds numbers that are not finite; train with a lower rate")
            self._keys.setdefault(match["module"], {})[match["side"] or _MAGNITUDE] = key
        if not self._keys:
            raise IntegrityError("adapter: adapter_model.safetensors holds no tensor")
        wanted = {"A", "B"} | ({_MAGNITUDE} if self.config.get("use_dora") else set())
        for module, keys in sorted(self._keys.items()):
            if wrong := sorted(wanted - set(keys)):
                raise IntegrityError(f"adapter: {module}: its lora_{wrong[0]} is missing")
            if set(keys) - wanted:
                raise IntegrityError(f"adapter: {module} has a magnitude, but adapter_config.json says nothing of DoRA")
        self.modules = sorted(self._keys)
        return self

    def merged(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter in it, in bf16: W + scale * B A, with DoRA each row at its trained length.

        Args:
            module: One of `modules`.
            weight: (out features, in features), any float type; the sum is taken in fp32 and rounded once.

        DoRA: Liu et al., arXiv 2402.09353, eq. 5: m (W + scale * B A) / |W + scale * B A|, by output feature.
        """
        keys = self._keys[module]
        a, b = (self.tensor(keys[side]).float() for side in "AB")
        length = self.tensor(keys[_MAGNITUDE]).float().reshape(-1, 1) if _MAGNITUDE in keys else None
        scale = self.scale(module, a, b)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise IntegrityError(
                f"adapter: {module}: is {tuple(weight.shape)} in the base, the adapter was trained over "
                f"{(b.shape[0], a.shape[1])}"
            )
        found = torch.empty(weight.shape, dtype=torch.bfloat16)
        rows = max(1, _AT_ONCE // weight.shape[1])
        for part in (slice(start, start + rows) for start in range(0, weight.shape[0], rows)):
            total = torch.addmm(weight[part].float(), b[part], a, alpha=scale)
            if length is not None:
                total.mul_(length[part] / torch.linalg.vector_norm(total, dim=1, keepdim=True))
            found[part] = total
        return found

    def scale(self, module: str, a: torch.Tensor, b: torch.Tensor) -> float:
        """alpha/rank, or alpha/sqrt(rank) with rsLoRA, after the module's own rank and alpha if it has them."""
        rank = int(_of(module, self.config.get("rank_pattern"), self.config["r"]))
        alpha = float(_of(module, self.config.get("alpha_pattern"), self.config["lora_alpha"]))
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


def _of(module: str, pattern: dict[str, Any] | None, default: Any) -> Any:
    """The first pattern that names the module, as PEFT matches them: a regular expression at the name's end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
