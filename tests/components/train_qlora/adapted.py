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


def export_random(base: Any, method: str, folder: Path, *, size: float = 0.05, seed: int = 0) -> Path:
    """Write an adapter of a method with random numbers over a loaded base, as training would."""
    virtual = {"num_virtual_tokens": 3} if method in ("prompt", "prefix") else {}
    config = TrainConfig(**(SETTINGS | virtual | {"method": method}))
    torch.manual_seed(seed)
    model = adapter.attach_new(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.export(model, folder, config)
    return folder
