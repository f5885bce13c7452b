"""The first check of any run: a few short rows must be learnt, or something is wrong that no step will mend."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from components.train_qlora import lora, packed, ranks
from components.train_qlora.loss import summed_loss, supervised
from components.train_qlora.rows import Batch, Collate, Rows
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import TryAgain, UsageError

ROWS = 8  # the shortest
STEPS = 40  # at most
LEARNT = 0.1  # of the first loss: learnt by heart, no need to go on
FALLEN = 0.98  # of the first loss: a smaller fall in all the steps may be rounding, which bf16 does by a hundredth
SHARE = 0.05  # of the run's tokens at most


def overfit(model: Any, config: TrainConfig, rows: Rows, pad: int, steps: int) -> None:
    """Train on one batch, then put adapter and random state back as they were.

    Args:
        model: With its fresh adapter.
        config: Its learning rate is the one that is tried.
        rows: The training rows.
        pad: The token to pad with.
        steps: Optimizer steps of the real run, which says how much may be spent here.

    Raises:
        UsageError: If the loss does not fall.
        TryAgain: If asked to stop.
    """
    shortest = sorted(range(len(rows)), key=lambda i: rows.lengths[i])[:ROWS]
    cost = (STEPS + 1) * sum(rows.lengths[i] for i in shortest)  # one more to see what the last step did
    planned = steps * config.batch_size * config.gradient_accumulation * sum(rows.lengths) / len(rows)
    if cost > SHARE * planned:
        progress.say(f"preflight: skipped: its {cost} tokens are more than {SHARE:.0%} of the run's {planned:.0f}")
        return
    before, random_state = lora.weights(model), torch.get_rng_state()
    losses = _losses(model, config, Collate(pad)([rows[i] for i in shortest]))
    lora.put(model, before)
    torch.set_rng_state(random_state)
    first, last = losses[0], min(losses[1:])
    if not last <= FALLEN * first:  # not a number is no fall either
        raise UsageError(
            f"preflight: {len(shortest)} rows were shown {len(losses) - 1} times and their loss went from {first:.3f} "
            f"to no less than {last:.3f}: nothing is learnt. Look at train.learning_rate ({config.learning_rate:g}), "
            "at what is supervised (the mask), at the chat template and at the tokenizer"
        )
    progress.say(f"preflight: {len(shortest)} rows, loss {first:.3f} to {last:.3f} in {len(losses) - 1} steps")


def _losses(model: Any, config: TrainConfig, batch: Batch) -> list[float]:
    """The mean loss before the first step and after each."""
    model.eval()  # without dropout
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # or it would keep what the run itself does not
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    parts = packed.cut(batch, packed.passes(batch, config.batch_size, packs=packed.can_pack(model)))
    losses: list[float] = []
    for step in range(STEPS + 1):
        if signals.requested():
            raise TryAgain("asked to stop before the first step; run it again")
        loss = _backward(model, parts, int(supervised(batch).sum()))
        losses.append(ranks.summed(loss)[0] / ranks.count())  # all do the same, and end with the same step
        if step == STEPS or losses[-1] < LEARNT * losses[0]:
            break
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    model.zero_grad()
    return losses


def _backward(model: Any, parts: list[Batch], tokens: int) -> float:
    """The mean loss over all parts, in passes no larger than the run's; gradients are added up."""
    total = 0.0
    with packed.attention_by_rows(model):
        for part in parts:
            loss = summed_loss(model, part) / tokens
            loss.backward()
            total += loss.item()
    return total
