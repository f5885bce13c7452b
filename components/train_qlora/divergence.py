"""Recognize a run that no longer learns, from its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from components.train_qlora.history import LogHistory
from qlora_retrain.config.sections import TrainConfig

# A mean training loss over 20 steps is hopeless where it is above 1.5 times that of guessing, and above the first
# step's loss.
HOPELESS_STEPS = 20
HOPELESS_FACTOR = 1.5


def hopeless_training_loss(log: LogHistory, vocab_size: int) -> str | None:
    """Return a sentence about the recent training losses where they are hopeless, None where they are not."""
    # Evaluations have entries of their own between the steps.
    recent_losses = [entry["loss"] for entry in log[-2 * HOPELESS_STEPS :] if "loss" in entry][-HOPELESS_STEPS:]
    first_loss = next((entry["loss"] for entry in log if "loss" in entry), 0.0)
    mean = sum(recent_losses) / HOPELESS_STEPS

    # A uniform distribution over the vocabulary costs log(vocab_size) nats per token.
    limit = max(HOPELESS_FACTOR * math.log(vocab_size), first_loss)
    if len(recent_losses) >= HOPELESS_STEPS and mean > limit:
        return f"the mean loss of the last {HOPELESS_STEPS} steps is {mean:.1f} nats per token, worse than guessing"
    return None


def hopeless_eval_loss(earlier_losses: Sequence[float], loss: float, config: TrainConfig) -> str | None:
    """Return a sentence about the evaluation losses where they are hopeless, None where they are not.

    Args:
        earlier_losses: The losses before this one, oldest first.
        loss: The newest loss.
        config: `divergence_factor` and `divergence_patience` are the limits.
    """
    # A single bad evaluation may be noise; `divergence_patience` of them in a row are not.
    recent_losses = [*earlier_losses, loss][-config.divergence_patience :]
    limit = config.divergence_factor * min(earlier_losses, default=math.inf)
    if not math.isfinite(loss):
        return f"the evaluation loss is {loss}"
    if len(recent_losses) == config.divergence_patience and min(recent_losses) > limit:
        return f"the evaluation loss is {loss:.3f}, {len(recent_losses)} times in a row above {limit:.3f}"
    return None
