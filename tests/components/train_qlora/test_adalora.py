"""AdaLoRA's loss, gradients and allocation of ranks are PEFT's; its ranks end at the budget and are reported."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

from components.train_qlora import adapter
from components.train_qlora.loss import summed_loss
from components.train_qlora.methods import adalora, method_of
from components.train_qlora.micro_batches import prepare
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import loading
from tests.components.train_qlora.adapted import SETTINGS, adapted

IDS = torch.arange(3, 27).view(2, 12)
STEPS = 20


@pytest.fixture
def pair(nf4):
    """Return our model, its method, and PEFT's model with the same numbers; it begins with the rank 6 of each layer."""
    method = method_of(TrainConfig(**(SETTINGS | {"method": "adalora"})))
    ours, _ = adapted(nf4, method)
    settings = AdaLoraConfig(
        init_r=6,
        target_r=4,
        lora_alpha=12,  # it is divided by the initial rank there
        tinit=round(adalora.WARMUP_FRACTION * STEPS),
        tfinal=round(adalora.FINAL_FRACTION * STEPS),
        total_step=STEPS,
        orth_reg_weight=adalora.PENALTY_WEIGHT,
        target_modules=ours.peft_config["default"].target_modules,
    )
    theirs = get_peft_model(loading.load_nf4(nf4), settings)
    numbers = {our_name(name): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                numbers[name].copy_(parameter)
    return ours, method, theirs


def our_name(name: str) -> str:
    """Return our name of a parameter of PEFT's."""
    return name + ".weight" if ".lora_A." in name or ".lora_B." in name else name


def trained(model) -> dict[str, torch.nn.Parameter]:
    """Return a model's trained parameters by our names."""
    return {our_name(n) if not n.endswith("weight") else n: p for n, p in model.named_parameters() if p.requires_grad}


def test_loss_penalty_and_gradients_are_pefts(pair) -> None:
    ours, method, theirs = pair
    loss = ours(input_ids=IDS, labels=IDS).loss + method.penalty(trained(ours))
    loss.backward()
    expected = theirs.base_model(input_ids=IDS, labels=IDS).loss  # a PeftModel without a task leaves the penalty out
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in trained(theirs).items():
        torch.testing.assert_close(trained(ours)[name].grad, parameter.grad, rtol=1e-3, atol=2e-5)


def test_ranks_move_as_pefts_do(pair) -> None:
    ours, method, theirs = pair
    generator = torch.Generator().manual_seed(0)
    layer_scales = {name: float(torch.rand((), generator=generator)) for name in trained(ours)}
    for step in range(STEPS):
        method.begin_step(step, STEPS)
        for name, parameter in trained(ours).items():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * layer_scales[name]
            trained(theirs)[name].grad = parameter.grad.clone()
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.01)
                if step + 1 < STEPS * (1 - adalora.FINAL_FRACTION):
                    trained(theirs)[name].sub_(parameter.grad, alpha=0.01)
        method.end_step(trained(ours))
        if step + 1 < STEPS * (1 - adalora.FINAL_FRACTION):
            # PEFT cuts its matrices at the last of these steps; ours stay, with zeros.
            theirs.base_model.update_and_allocate(step + 1)
            for name, parameter in trained(ours).items():
                torch.testing.assert_close(parameter, trained(theirs)[name])
    ranks = {n: int((p != 0).sum()) for n, p in trained(ours).items() if ".lora_E." in n}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1


def test_a_run_ends_with_its_budget_and_reports_the_ranks(step) -> None:
    run = step("adalora")
    run(method="adalora", rank=4, alpha=None, max_steps=8)
    document = json.loads((run.adapter / "training.json").read_text())
    ranks = document["ranks"]
    assert sum(ranks.values()) == 4 * len(ranks)
    # What ships is one rank, the largest.
    config = json.loads((run.adapter / adapter.CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    shipped = adapter.tensors_by_layer(adapter.load_weights(run.adapter))
    assert {name: int((t["A"] != 0).any(1).sum()) for name, t in shipped.items()} == ranks
    assert "rank" in (run.adapter / "report.html").read_text()


# Half of the way from 2 to 10, an eighth of the surplus of 20 is left, and it is rounded down.
@pytest.mark.parametrize(("step", "budget"), [(1, 60), (2, 60), (6, 42), (10, 40), (20, 40)])
def test_the_budget_falls_as_a_cube(step: int, budget: int) -> None:
    assert adalora.budget_of_step(step, 2, 10, 60, 40) == budget


def test_packed_rows_reach_the_singular_values(pair) -> None:
    ours, _, _ = pair
    batch = prepare(ours, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS})
    summed_loss(ours, batch).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in trained(ours).items() if ".lora_E." in n)
