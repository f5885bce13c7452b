"""Read the scales of IA3 and merge them into single weights, without PEFT and without a model.

A scale of a layer's outputs multiplies the rows of its weight and its bias; one of its inputs multiplies the columns.
Reads `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them. Refuses (13) tensors that do not belong
together, and (14) numbers that are not finite.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from qlora_retrain.core.errors import Diverged, IntegrityError
from qlora_retrain.core.safety import read_json
from qlora_retrain.lm.adapter_kind import CONFIG_FILE, WEIGHTS_FILE
from qlora_retrain.lm.weight_files import SafetensorsFolder, is_finite

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.ia3_l")


class Ia3Adapter(SafetensorsFolder):
    """A trained IA3 adapter; open it with `with`.

    Attributes:
        config: `adapter_config.json`.
        modules: The names of the linear layers that it changes, sorted.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file=WEIGHTS_FILE)
        self.config: dict[str, Any] = read_json(folder / CONFIG_FILE, folder.name)
        self.modules: list[str] = []
        self._tensor_names: dict[str, str] = {}  # by module

    def __enter__(self) -> Ia3Adapter:
        super().__enter__()
        for name in self.names:
            match = _TENSOR_NAME.fullmatch(name)
            if not match or 1 not in self.spec(name).shape:
                raise IntegrityError(f"adapter: tensor {name} is no scale of IA3, and the adapter's peft_type is IA3")
            if not is_finite(self.tensor(name)):
                raise Diverged(f"adapter: {name} holds numbers that are not finite; train with a lower learning rate")
            self._tensor_names[match["module"]] = name
        if not self._tensor_names:
            raise IntegrityError(f"adapter: {WEIGHTS_FILE} holds no tensor")
        self.modules = sorted(self._tensor_names)
        return self

    def merge_into(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight (out, in) with its rows or columns scaled in fp32, rounded once, to bf16."""
        scale = self.tensor(self._tensor_names[module]).float()  # (out, 1), or (1, in)
        expected = (1, weight.shape[1]) if self._scales_inputs(module) else (weight.shape[0], 1)
        if tuple(scale.shape) != expected:
            raise IntegrityError(
                f"adapter: {module}: its scale is {tuple(scale.shape)}, and {expected} is expected for the base's "
                f"weight {tuple(weight.shape)}; it was trained over another base"
            )
        return (weight.float() * scale).to(torch.bfloat16)

    def merge_into_bias(self, module: str, bias: torch.Tensor) -> torch.Tensor:
        """Return the bias (out,) as it is after the outputs were scaled, in bf16; a scale of inputs leaves it."""
        if self._scales_inputs(module):
            return bias
        return (bias.float() * self.tensor(self._tensor_names[module]).float().flatten()).to(torch.bfloat16)

    def _scales_inputs(self, module: str) -> bool:
        return any(module.endswith(name) for name in self.config.get("feedforward_modules") or ())
