"""A tiny model with an adapter whose matrices are not zero, for tests of what an adapter computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from components.train_qlora import adapter
from components.train_qlora.methods import Lora, method_of
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import adapter_start, loading

SETTINGS: dict[str, Any] = {"rank": 4, "device": "cpu", "dropout": 0.0, "attention": "eager", "precision": "float32"}


def adapted(nf4: Path, method: str | Lora, **settings: Any) -> tuple[PeftModel, TrainConfig]:
    """Attach an adapter to a model that computes in fp32, and give numbers to what is zero in a new one."""
    if isinstance(method, str):
        method = method_of(TrainConfig(**(SETTINGS | settings | {"method": method})))
    torch.manual_seed(0)
    model = adapter.attach_new(loading.load_nf4(nf4), method.config, method, adapter_start.read(nf4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_A" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, method.config
