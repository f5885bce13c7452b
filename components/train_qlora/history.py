"""What the log of the Trainer, which is in every checkpoint, says of a run: steps, speed, measurements.

The log is a list of entries; those with `loss` are optimizer steps, those with `eval_loss` measurements on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Log = Sequence[dict[str, Any]]
STEP = ("step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "epoch")
TIMING = ("step", "tokens_per_second", "memory_mib")
CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mib")


def steps(log: Log) -> list[dict[str, Any]]:
    """Loss, gradient norm, learning rate and tokens of every step: the same in every run of the same recipe."""
    return [{name: entry[name] for name in STEP} for entry in log if "loss" in entry]


def timings(log: Log) -> list[dict[str, Any]]:
    """What differs from run to run: speed and memory of every step."""
    return [{name: entry[name] for name in TIMING} for entry in log if "loss" in entry]


def seconds(log: Log) -> float:
    """What the steps took, with the measurements and saves between them; of work that was lost in a crash, nothing."""
    return sum(float(entry["tokens"] / entry["tokens_per_second"]) for entry in log if "loss" in entry)


def batch_size(log: Log) -> int | None:
    """That of the last step, None where there is none."""
    return next((entry["batch_size"] for entry in reversed(log) if "batch_size" in entry), None)


def peak_mib(log: Log) -> int:
    """The most memory of any step."""
    return max((int(entry["memory_mib"]) for entry in log if "loss" in entry), default=0)


def curves(log: Log) -> list[tuple[int, float, dict[str, float]]]:
    """(step, seconds since 1970, numbers by name) of every step and measurement, for TensorBoard."""
    return [
        (entry["step"], entry["time"], {f"train/{name}": entry[name] for name in CURVES if name in entry})
        for entry in log
        if "time" in entry
    ]


def evaluations(log: Log) -> list[tuple[int, float]]:
    """(step, mean loss a supervised token of the evaluation rows) of every measurement."""
    return [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]


def best_step(log: Log) -> int | None:
    """The step of the lowest evaluation loss, None where none was measured."""
    return min(evaluations(log), key=lambda found: found[1], default=(None, 0.0))[0]


def no_better(log: Log, patience: int | None) -> bool:
    """Whether the last `patience` measurements were no better than the best before them."""
    losses = [loss for _, loss in evaluations(log)]
    return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
