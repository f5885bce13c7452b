"""Which gradients reach the weights: only finite ones, clipped to the norm that was set."""

import json
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from components.train_qlora import train as training
from components.train_qlora.loss import summed_loss
from qlora_retrain.core.errors import Diverged


@pytest.fixture
def before_each_update():
    """Call a function with the parameters that have a gradient, before each step of any optimizer."""
    handles = []

    def call_before_step(function) -> None:
        def hook(optimizer: Any, *_: Any) -> None:
            function([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

        handles.append(register_optimizer_step_pre_hook(hook))

    yield call_before_step

    for handle in handles:
        handle.remove()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(step, monkeypatch, before_each_update):
    calls, is_finite = iter(range(1000)), []

    def steep_loss(model: Any, batch: Any) -> torch.Tensor:
        loss = summed_loss(model, batch)
        # From the fifth call on, the value stays as it is and the gradient overflows fp32.
        return loss + (loss - loss.detach()) * 1e38 * 1e38 * (next(calls) >= 4)

    before_each_update(lambda parameters: is_finite.append(all(bool(p.grad.isfinite().all()) for p in parameters)))
    monkeypatch.setattr(training, "summed_loss", steep_loss)
    with pytest.raises(
        Diverged, match=r"step 3 of 14: the (loss|gradient norm) is (inf|nan); there is no checkpoint yet"
    ):
        step()()
    assert is_finite == [True, True]


def test_gradients_are_clipped_to_the_norm_that_was_set(step, before_each_update):
    # The log has the norm before clipping, the optimizer sees the gradients after it.
    norms: list[float] = []
    before_each_update(lambda parameters: norms.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm())))
    run = step()
    run(max_grad_norm=0.05, max_steps=3)
    logged_norms = [json.loads(line)["grad_norm"] for line in (run.adapter / "loss.jsonl").read_text().splitlines()]
    assert all(norm > 0.05 for norm in logged_norms), "else there was nothing to clip"
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)
