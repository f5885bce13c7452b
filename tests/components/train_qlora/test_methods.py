"""Each method learns as PEFT's does, and ships as plain LoRA that says the same as the adapter in training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from components.train_qlora import adapter
from components.train_qlora.methods import METHODS, method_of
from components.train_qlora.optimizer import AdapterOptimizer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.lm import loading

SETTINGS: dict[str, Any] = {"rank": 4, "device": "cpu", "dropout": 0.0, "attention": "eager", "precision": "float32"}


def adapted(nf4, **settings: Any) -> tuple[PeftModel, TrainConfig]:
    """Attach an adapter with matrices that are not zero."""
    config = TrainConfig(**(SETTINGS | settings))
    torch.manual_seed(0)
    model = adapter.attach_new(loading.load_nf4(nf4), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model, config


def test_lora_plus_steps_as_pefts_optimizer_does(nf4) -> None:
    (ours, config), (theirs, _) = (adapted(nf4, method="lora+", learning_rate_ratio=8.0) for _ in range(2))
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    optimizer = AdapterOptimizer(config, trained.items())
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, weight_decay=0.0)

    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                trained[name].grad = parameter.grad.clone()
        optimizer.step(1e-3)
        reference.step()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_what_ships_is_plain_lora_and_computes_what_was_trained(
    nf4, tmp_path, method: str, alpha: float | None
) -> None:
    model, config = adapted(nf4, method=method, alpha=alpha)
    adapter.export(model.eval(), tmp_path, config)
    document = json.loads((tmp_path / adapter.CONFIG_FILE).read_text())
    assert (document["r"], document["lora_alpha"], document["use_rslora"]) == (4, 4, False)
    assert type(document["lora_alpha"]) is int

    shipped = PeftModel.from_pretrained(loading.load_nf4(nf4), str(tmp_path)).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(shipped(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)

    # The scale 2 changes no digit.
    if alpha is None:
        layer = next(name for name in adapter.load_weights(tmp_path) if name.endswith("lora_B.weight"))
        assert torch.equal(adapter.load_weights(tmp_path)[layer], 2 * adapter.copy_weights(model)[layer])
    assert method_of(config).alpha == (alpha or 2 * (4 if method != "rslora" else 2))


@pytest.mark.parametrize("method", ["lora+", "rslora"])
def test_a_run_of_each_method_goes_on_bit_for_bit(step, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    whole, stopped = step("whole"), step("stopped")
    whole(method=method, alpha=None, max_steps=6)
    checks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: next(checks) >= 3)
        with pytest.raises(TryAgain):
            stopped(method=method, alpha=None, max_steps=6)
    stopped(method=method, alpha=None, max_steps=6)
    assert stopped.weights == whole.weights
