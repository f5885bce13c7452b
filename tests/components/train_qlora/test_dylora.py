"""In each step DyLoRA computes with the first ranks, at alpha divided by their number, and learns what it should."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from components.train_qlora import adapter
from components.train_qlora.methods import method_of
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import loading
from tests.components.train_qlora.adapted import SETTINGS, adapted

IDS = torch.arange(3, 27).view(2, 12)
TOTAL_STEPS = 400


def new_method(**settings):
    return method_of(TrainConfig(**(SETTINGS | {"method": "dylora"} | settings)))


def step_of_rank(method, rank: int) -> int:
    """Return a step that draws this rank."""
    for step in range(TOTAL_STEPS):
        method.begin_step(step, TOTAL_STEPS)
        if method.step_rank == rank:
            return step
    raise AssertionError(f"no step draws rank {rank}")


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("update", ["all", "single"])
def test_a_step_is_that_of_a_smaller_adapter(nf4, rank: int, update: str) -> None:
    method = new_method(dylora_update=update, alpha=6.0)
    ours, _ = adapted(nf4, method)
    settings = LoraConfig(r=rank, lora_alpha=6.0, target_modules=ours.peft_config["default"].target_modules)
    theirs = get_peft_model(loading.load_nf4(nf4), settings)
    weights = adapter.copy_weights(ours)
    cut = {n: t[:rank] if "lora_A" in n else t[:, :rank].contiguous() for n, t in weights.items()}
    set_peft_model_state_dict(theirs, cut)

    step_of_rank(method, rank)
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    first = rank - 1 if update == "single" else 0
    expected_grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            dim = 0 if "lora_A" in name else 1
            own = parameter.grad.narrow(dim, first, rank - first)
            expected = expected_grads[name].narrow(dim, first, rank - first)
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
            assert parameter.grad.norm() == pytest.approx(own.norm().item())  # all others are zero


def test_every_rank_is_drawn_by_seed_and_step_alone() -> None:
    method, again = new_method(rank=8), new_method(rank=8)
    draws = []
    for step in range(TOTAL_STEPS):
        torch.rand(3)  # whatever dropout draws in one process and not in another
        method.begin_step(step, TOTAL_STEPS)
        again.begin_step(step, TOTAL_STEPS)
        assert method.step_rank == again.step_rank
        draws.append(method.step_rank)
    counts = torch.bincount(torch.tensor(draws), minlength=9)
    assert counts[0] == 0
    assert counts[1:].min() > TOTAL_STEPS / 8 / 2
    other_seed = new_method(rank=8, seed=1)
    other_draws = []
    for step in range(TOTAL_STEPS):
        other_seed.begin_step(step, TOTAL_STEPS)
        other_draws.append(other_seed.step_rank)
    assert other_draws != draws


def test_between_the_steps_the_whole_rank_computes() -> None:
    method = new_method()
    layer = SimpleNamespace(
        lora_A={"default": torch.nn.Linear(5, 4, bias=False)}, lora_B={"default": torch.nn.Linear(4, 6, bias=False)}
    )
    step_of_rank(method, 2)
    assert [m.shape for m in method.matrices(layer)] == [(2, 5), (6, 2)]
    method.end_step({})
    assert [m.shape for m in method.matrices(layer)] == [(4, 5), (6, 4)]
    assert method.scale(layer) == 1.0


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_that_is_cut_out_afterwards_is_what_was_trained(nf4, tmp_path, rank: int) -> None:
    from components.merge_adapter import adapter_forms

    settings = {"alpha": 6.0}
    method = new_method(**settings)
    ours, _ = adapted(nf4, method)
    (tmp_path / "adapter").mkdir()
    adapter.export(ours, tmp_path / "adapter", method.config)
    (tmp_path / "adapter/training.json").write_text('{"settings": {"method": "dylora"}}')
    adapter_forms.cut(tmp_path / "adapter", tmp_path / "cut", rank)

    step_of_rank(method, rank)
    theirs = loading.attach_adapter(loading.load_nf4(nf4), tmp_path / "cut")
    with torch.inference_mode():
        expected, logits = (model.eval()(input_ids=IDS).logits for model in (ours, theirs))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
