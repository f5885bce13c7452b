"""Read the adapter's matrices and merge them into single weights, without PEFT and without a model.

Reads `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them. Refuses (12) what is not LoRA or DoRA
on linear layers, (13) an adapter whose tensors do not belong together, and (14) numbers that are not finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_retrain.core.errors import Diverged, IntegrityError, UsageError
from qlora_retrain.lm.weight_files import SafetensorsFolder, is_finite

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|magnitude_vector(?:\.weight)?)"
)
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAGNITUDE = "magnitude"
_WHOLE_NAME = re.compile(r"base_model\.model\.(?P<path>(?:.+\.)?(?P<module>[^.]+)\.(?:weight|bias))")
_CHUNK_WEIGHTS = 2**17  # weights converted to fp32 at a time: 0.5 MB, which fits into a core's cache
# Settings of PEFT's LoRA that change the update, with the values that leave it unchanged.
_NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {
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


class LoraAdapter(SafetensorsFolder):
    """A trained LoRA or DoRA adapter; open it with `with`. Its matrices stay in their file until they are needed.

    Attributes:
        config: `adapter_config.json`.
        modules: The names of the linear layers that it changes, sorted.
        whole: The tensors that replace a weight of the model, since its module learnt whole, by the weight's name.
        minus: A and B by module of what is subtracted from the update: where the adapter started from what the 4-bit
            base lacks, the original base must not get that again.
    """

    def __init__(self, folder: Path, minus: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        super().__init__(folder, single_file=WEIGHTS_FILE)
        self.minus = minus or {}
        self.config = _read_config(folder / CONFIG_FILE)
        self.modules: list[str] = []
        self.whole: dict[str, str] = {}
        self._tensor_names: dict[str, dict[str, str]] = {}  # by module: the names of A, B and the magnitude

    def __enter__(self) -> LoraAdapter:
        super().__enter__()

        # An unknown tensor is refused. If it were skipped, the merged model would silently lack it.
        for name in self.names:
            match = _TENSOR_NAME.fullmatch(name)
            if not match and (whole := self._whole_name(name)):
                self.whole[whole] = name
                continue
            if not match:
                raise UsageError(f"adapter: tensor {name} is not LoRA on a linear layer, so it cannot be merged")
            if not is_finite(self.tensor(name)):
                raise Diverged(f"adapter: {name} holds numbers that are not finite; train with a lower learning rate")
            self._tensor_names.setdefault(match["module"], {})[match["side"] or MAGNITUDE] = name
        if not self._tensor_names:
            raise IntegrityError("adapter: adapter_model.safetensors holds no tensor")

        # With DoRA every module has a magnitude, without it none has. A mixture would merge to wrong weights.
        expected = {"A", "B"} | ({MAGNITUDE} if self.config.get("use_dora") else set())
        for module, sides in sorted(self._tensor_names.items()):
            if missing := sorted(expected - set(sides)):
                raise IntegrityError(f"adapter: {module}: its lora_{missing[0]} is missing")
            if set(sides) - expected:
                raise IntegrityError(
                    f"adapter: {module} has a DoRA magnitude, but use_dora is not set in adapter_config.json"
                )
        self.modules = sorted(self._tensor_names)
        return self

    def _whole_name(self, name: str) -> str | None:
        """Return the name in the model of a weight that learnt whole; None for any other tensor."""
        match = _WHOLE_NAME.fullmatch(name)
        is_whole = match and match["module"] in (self.config.get("modules_to_save") or ())
        return match["path"] if match and is_whole else None

    def merge_into(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the adapter in it, in bf16: W + scaling * B A.

        With DoRA each row is then scaled to its trained magnitude. Liu et al., arXiv 2402.09353, eq. 5:
        m (W + scaling * B A) / |W + scaling * B A|, by output feature.

        Args:
            module: One of `modules`.
            weight: (out features, in features), any float type; the sum is taken in fp32 and rounded once.
        """
        sides = self._tensor_names[module]
        a, b = (self.tensor(sides[side]).float() for side in "AB")  # (rank, in), (out, rank)
        magnitude = self.tensor(sides[MAGNITUDE]).float().reshape(-1, 1) if MAGNITUDE in sides else None
        scaling = self.scaling(module, a, b)
        if module in self.minus:
            # B A - B0 A0 is one product of twice the rank.
            a0, b0 = self.minus[module]
            a, b, scaling = torch.cat([a, a0.float()]), torch.cat([scaling * b, -b0.float()], dim=1), 1.0
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise IntegrityError(
                f"adapter: {module}: the weight is {tuple(weight.shape)} in the base, but the adapter was trained over "
                f"{(b.shape[0], a.shape[1])}"
            )

        # In chunks of rows, since an fp32 copy of the whole weight would be twice its size and not fit into the cache.
        merged = torch.empty(weight.shape, dtype=torch.bfloat16)
        chunk_rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
        for rows in (slice(start, start + chunk_rows) for start in range(0, weight.shape[0], chunk_rows)):
            total = torch.addmm(weight[rows].float(), b[rows], a, alpha=scaling)  # (chunk rows, in features)
            if magnitude is not None:
                total.mul_(magnitude[rows] / torch.linalg.vector_norm(total, dim=1, keepdim=True))
            merged[rows] = total
        return merged

    def rank(self, module: str) -> int:
        """Return the number of rows of a module's A."""
        return self.spec(self._tensor_names[module]["A"]).shape[0]

    def update(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (rank, in) and B (out, rank) with delta W = B A, in fp64: the scale is in B."""
        a, b = (self.tensor(self._tensor_names[module][side]).double() for side in "AB")
        return a, b * self.scaling(module, a, b)

    def tensors(self, module: str, rank: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the name and the shape of each of a module's tensors if it had this rank: A, B, DoRA's magnitude."""
        names = self._tensor_names[module]
        shapes = {part: self.spec(name).shape for part, name in names.items()}
        shapes |= {"A": (rank, shapes["A"][1]), "B": (shapes["B"][0], rank)}
        return {part: (names[part], shape) for part, shape in shapes.items()}

    def magnitudes(self, module: str) -> dict[str, torch.Tensor]:
        """Return DoRA's magnitude of a module in fp32, by its part's name; empty without DoRA."""
        names = self._tensor_names[module]
        return {MAGNITUDE: self.tensor(names[MAGNITUDE]).float()} if MAGNITUDE in names else {}

    def scaling(self, module: str, a: torch.Tensor, b: torch.Tensor) -> float:
        """Return alpha/rank, or alpha/sqrt(rank) with rsLoRA, by the module's own rank and alpha where it has them."""
        # The matrices must have the rank of the config, or the update would be scaled wrongly.
        rank = int(_match_pattern(module, self.config.get("rank_pattern"), self.config["r"]))
        alpha = float(_match_pattern(module, self.config.get("alpha_pattern"), self.config["lora_alpha"]))
        if a.shape[0] != rank or b.shape[1] != rank:
            raise IntegrityError(
                f"adapter: {module}: adapter_config.json says rank {rank}, but the matrices are "
                f"{tuple(b.shape)} and {tuple(a.shape)}"
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _read_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json, and refuse settings with which the update is not scaling * B A."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UsageError(f"adapter: its peft_type is {config.get('peft_type')}; only LORA can be merged")
    for name, neutral in _NEUTRAL_SETTINGS.items():
        if name in config and config[name] not in neutral:
            raise UsageError(f"adapter: {name}={config[name]!r} cannot be merged; train without it")
    return config


def _match_pattern(module: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    """Return the value of the first pattern that matches the module, as PEFT matches: a regex at the name's end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
