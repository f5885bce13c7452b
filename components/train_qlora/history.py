"""Read a run's steps, speed and evaluations from its log, which is in every checkpoint.

The log says what earlier attempts trained too. A file in scratch says at which step this attempt began.

A run that no longer learns is recognized from its losses.

The log is a list of entries. An entry with `loss` is an optimizer step; an entry with `eval_loss` is an evaluation
during training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_retrain.config.sections import TrainConfig

LogHistory = Sequence[dict[str, Any]]
STEP_FIELDS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "epoch")
TIMING_FIELDS = ("step", "tokens_per_second", "memory_mib")
FIRST_STEP_FILE = "first_step.txt"
MICRO_BATCH_FILE = "micro_batch_size.txt"
STATE_FILE = "state.json"  # in a checkpoint: the step and the log
CURVE_FIELDS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mib")
# A mean training loss over 20 steps is hopeless where it is above 1.5 times that of guessing, and above the first
# step's loss.
HOPELESS_STEPS = 20
HOPELESS_FACTOR = 1.5


def max_state_bytes(step: int) -> int:
    """Return more bytes than the state file of this step has: an entry of the log has some 300."""
    return 2**20 + 4096 * step


def steps(log: LogHistory) -> list[dict[str, Any]]:
    """Return loss, gradient norm, learning rate and tokens of every step; every run of a recipe has the same ones."""
    return [{name: entry[name] for name in STEP_FIELDS} for entry in log if "loss" in entry]


def timings(log: LogHistory) -> list[dict[str, Any]]:
    """Return speed and memory of every step, which differ from run to run."""
    return [{name: entry[name] for name in TIMING_FIELDS} for entry in log if "loss" in entry]


def training_seconds(log: LogHistory) -> float:
    """Return the time that the logged steps took, evaluations and saves between them included.

    Steps that were lost in a crash are not in the log, so their time does not count.
    """
    return sum(float(entry["tokens"] / entry["tokens_per_second"]) for entry in log if "loss" in entry)


def last_batch_size(log: LogHistory) -> int | None:
    """Return the batch size of the last step, None where there is no step."""
    return next((entry["batch_size"] for entry in reversed(log) if "batch_size" in entry), None)


def peak_memory_mib(log: LogHistory) -> int:
    """Return the largest memory of any step."""
    return max((int(entry["memory_mib"]) for entry in log if "loss" in entry), default=0)


def curves(log: LogHistory) -> list[tuple[int, float, dict[str, float]]]:
    """Return (step, seconds since 1970, values by tag) of every step and evaluation, for TensorBoard."""
    return [
        (entry["step"], entry["time"], {f"train/{name}": entry[name] for name in CURVE_FIELDS if name in entry})
        for entry in log
        if "time" in entry
    ]


def eval_losses(log: LogHistory) -> list[tuple[int, float]]:
    """Return (step, mean loss per supervised token of the evaluation rows) of every evaluation."""
    return [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]


def note_micro_batch_size(scratch: Path, size: int) -> None:
    """Note the micro-batch size that a training process uses where the setting is `auto`."""
    (scratch / MICRO_BATCH_FILE).write_text(str(size), encoding="ascii")


def noted_micro_batch_size(scratch: Path) -> int | None:
    """Return the size that a training process of this attempt has noted; None where none has."""
    path = scratch / MICRO_BATCH_FILE
    return int(path.read_text(encoding="ascii")) if path.exists() else None


def best_step(log: LogHistory) -> int | None:
    """Return the step of the lowest evaluation loss, None where there was no evaluation."""
    return min(eval_losses(log), key=lambda step_and_loss: step_and_loss[1], default=(None, 0.0))[0]


def has_stopped_improving(log: LogHistory, patience: int | None) -> bool:
    """Return whether none of the last `patience` evaluations was better than the best before them."""
    losses = [loss for _, loss in eval_losses(log)]
    return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def begin_attempt(scratch: Path) -> None:
    """Forget at which step an earlier attempt began, and which micro-batch size it found."""
    for name in (FIRST_STEP_FILE, MICRO_BATCH_FILE):
        (scratch / name).unlink(missing_ok=True)


def note_first_step(scratch: Path, step: int) -> None:
    """Note the step that the attempt resumes from, 0 for its start. Where it begins again, the first note counts."""
    if not (scratch / FIRST_STEP_FILE).exists():
        (scratch / FIRST_STEP_FILE).write_text(str(step), encoding="ascii")


def first_step(scratch: Path) -> int:
    """Return the step that the attempt resumed from."""
    return int((scratch / FIRST_STEP_FILE).read_text(encoding="ascii"))


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
