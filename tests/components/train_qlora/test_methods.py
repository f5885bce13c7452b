"""Each method learns as PEFT's does, and ships as plain LoRA that says the same as the adapter in training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from components.train_qlora import adapter
from components.train_qlora.methods import METHODS, Lora, method_of
from components.train_qlora.optimizer import AdapterOptimizer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.lm import adapter_start, loading
from tests.components.train_qlora.adapted import SETTINGS, adapted

WITH_ADAPTER = [name for name, method in METHODS.items() if issubclass(method, Lora)]


def test_lora_plus_steps_as_pefts_optimizer_does(nf4) -> None:
    (ours, config), (theirs, _) = (adapted(nf4, "lora+", learning_rate_ratio=8.0) for _ in range(2))
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


@pytest.mark.parametrize(
    ("method", "alpha"), [*((name, None) for name in WITH_ADAPTER), ("lora", 3.0), ("adalora", 3.0)]
)
def test_what_ships_is_plain_lora_and_computes_what_was_trained(
    base_of, tmp_path, method: str, alpha: float | None
) -> None:
    nf4 = base_of(method)
    model, config = adapted(nf4, method, alpha=alpha)
    adapter.export(model.eval(), tmp_path, config)
    document = json.loads((tmp_path / adapter.CONFIG_FILE).read_text())
    rank = method_of(config).rank
    assert (document["r"], document["lora_alpha"], document["use_rslora"]) == (rank, rank, False)
    assert type(document["lora_alpha"]) is int
    assert document["use_dora"] == (method == "dora")

    # PEFT and the other steps compute what training did.
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        for shipped in (
            PeftModel.from_pretrained(loading.load_nf4(nf4), str(tmp_path)).eval(),
            loading.attach_adapter(loading.load_nf4(nf4), tmp_path),
        ):
            torch.testing.assert_close(shipped(ids).logits, expected, rtol=1e-5, atol=2e-5)
            with shipped.disable_adapter():
                torch.testing.assert_close(shipped(ids).logits, loading.load_nf4(nf4)(ids).logits)

    # The scale 2 changes no digit.
    if alpha is None and method in ("lora", "rslora", "lora+"):
        layer = next(name for name in adapter.load_weights(tmp_path) if name.endswith("lora_B.weight"))
        assert torch.equal(adapter.load_weights(tmp_path)[layer], 2 * adapter.copy_weights(model)[layer])
    assert method_of(config).alpha == (alpha or {"rslora": 4, "dylora": 4, "qdylora": 4}.get(method, 8))


# In CI those with a state or a start of their own; LoRA is in other tests.
@pytest.mark.parametrize(
    "method",
    [
        "adalora",
        "ir-qlora",
        "loftq",
        *(
            pytest.param(m, marks=pytest.mark.soak)
            for m in ("rslora", "lora+", "dora", "dylora", "qa-lora", "lora-xs", "lq-lora")
        ),
    ],
)
def test_a_run_of_each_method_goes_on_bit_for_bit(step, base_of, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    whole, stopped = step("whole"), step("stopped")
    whole.base_nf4 = stopped.base_nf4 = base_of(method)
    whole(method=method, alpha=None, max_steps=6)
    checks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: next(checks) >= 3)
        with pytest.raises(TryAgain):
            stopped(method=method, alpha=None, max_steps=6)
    stopped(method=method, alpha=None, max_steps=6)
    assert stopped.weights == whole.weights


# LoftQ's and LQ-LoRA's are there to change them.
@pytest.mark.parametrize("method", [name for name in WITH_ADAPTER if name not in ("loftq", "lq-lora")])
def test_a_new_adapter_changes_no_output(base_of, method: str) -> None:
    config, nf4 = TrainConfig(**(SETTINGS | {"method": method})), base_of(method)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = loading.load_nf4(nf4)(ids).logits
        model = adapter.attach_new(loading.load_nf4(nf4), config, start=adapter_start.read(nf4))
        logits = model(ids).logits
    # LoRA-XS begins with numbers near zero.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-2 if method == "lora-xs" else 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate_ratio": 4.0}, "learning_rate_ratio: 4.0 is for method: lora"),
        ({"method": "lora+", "dylora_update": "all"}, "dylora_update: all is for method: dylora, and method is lora"),
    ],
)
def test_a_knob_of_another_method_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
