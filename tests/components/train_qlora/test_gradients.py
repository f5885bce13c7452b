"""What of a gradient reaches the weights: nothing that is not finite, and no more than the norm that was set."""

import json
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from components.train_qlora import trainer as trainer_module
from components.train_qlora.loss import summed_loss
from qlora_retrain.core.errors import Diverged


@pytest.fixture
def before_each_update():
    """Look at the trained numbers before each step of any optimizer."""
    handles = []

    def arrange(look) -> None:
        def hook(optimizer: Any, *_: Any) -> None:
            look([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

        handles.append(register_optimizer_step_pre_hook(hook))

    yield arrange
    for handle in handles:
        handle.remove()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(step, monkeypatch, before_each_update):
    calls, finite = iter(range(1000)), []

    def steep(model: Any, batch: Any) -> torch.Tensor:
        loss = summed_loss(model, batch)
        return loss + (loss - loss.detach()) * 1e38 * 1e38 * (next(calls) >= 4)

    before_each_update(lambda found: finite.append(all(bool(p.grad.isfinite().all()) for p in found)))
    monkeypatch.setattr(trainer_module, "summed_loss", steep)
    with pytest.raises(
        Diverged, match=r"step 3 of 14: the (loss|gradient norm) is (inf|nan); there is no checkpoint yet"
    ):
        step()()
    assert finite == [True, True]


def test_gradients_are_clipped_to_the_norm_that_was_set(step, before_each_update):
    norms: list[float] = []
    before_each_update(lambda found: norms.append(float(torch.cat([p.grad.flatten() for p in found]).norm())))
    run = step()
    run(max_grad_norm=0.05, max_steps=3)
    found = [json.loads(line)["grad_norm"] for line in (run.adapter / "loss.jsonl").read_text().splitlines()]
    assert all(norm > 0.05 for norm in found), "else nothing was to be clipped"
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)
