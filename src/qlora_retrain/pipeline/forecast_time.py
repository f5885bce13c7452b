"""Say how long a plan's training takes: by the speed of earlier runs of the same base, else by arithmetic."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass

from qlora_retrain.lm.memory_model import Settings
from qlora_retrain.lm.model_shape import ModelShape
from qlora_retrain.pipeline.forecast import NotEstimated, Target, Work
from qlora_retrain.pipeline.past_runs import RowLengths

# The share of a card's data sheet that a step reaches, low, likely and high. Measured on no GPU yet.
GPU_SHARE = (0.2, 0.35, 0.6)
# Seconds in which a GPU starts the kernels of one layer, forward and backward, however few tokens there are: about 100
# kernels of 5 to 40 microseconds.
LAUNCH_SECONDS = (5e-4, 1.5e-3, 4e-3)
# Operations a second of one core, low, likely and high, by the precision; of cores with bf16 or AVX2 arithmetic.
CPU_FLOPS = {"bfloat16": (4e10, 1.2e11, 2.5e11), "float32": (1e10, 3e10, 6e10)}
# Of a time that follows from the speed of earlier runs.
TIME_RANGE = (0.8, 1.0, 1.3)


@dataclass(frozen=True)
class TimeForecast:
    """The seconds of training: low, likely and high, and where the speed is from."""

    low: float
    likely: float
    high: float
    source: str


def forecast_time(work: Work, target: Target) -> TimeForecast:
    """Return how long the training takes.

    Raises:
        NotEstimated: If the rows are not counted yet, or nothing is in the lists about the card.
    """
    if work.lengths is None or not work.lengths.rows:
        raise NotEstimated("validate_data has not counted the rows yet")
    tokens = num_tokens(work)
    flop = flop_per_token(work.shape, work.settings, work.lengths)
    # Speeds of other settings are scaled by the arithmetic of a token.
    speeds = [
        run.tokens_per_second * flop_per_token(work.shape, run.settings, run.lengths)
        for run in work.past_runs
        if run.tokens_per_second and run.lengths and run.settings.num_processes == work.settings.num_processes
    ]
    if speeds:
        likely = tokens * flop / statistics.median(speeds)
        low, _, high = (factor * likely for factor in TIME_RANGE)
        return TimeForecast(low, likely, high, f"by the speed of {len(speeds)} earlier run{'s' * (len(speeds) > 1)}")

    if work.settings.device == "cuda":
        if target.flops is None:
            raise NotEstimated(f"the speed of {target.label} is not in the list of cards; set gpus.NAME.tflops")
        rates = [share * target.flops * work.settings.num_processes for share in GPU_SHARE]
        source = f"by arithmetic, at {GPU_SHARE[0]:.0%} to {GPU_SHARE[2]:.0%} of the card's data sheet"
        launches = num_steps(work) * _micro_batches(work) * work.shape.layers
        waits = [launches * seconds for seconds in LAUNCH_SECONDS]
    else:
        cores = os.cpu_count() or 1
        rates, waits = [rate * cores for rate in CPU_FLOPS[work.settings.precision]], [0.0] * 3
        source = f"by arithmetic, on the {cores} cores of a machine like this"
    low, likely, high = (tokens * flop / rate + wait for rate, wait in zip(reversed(rates), waits, strict=True))
    return TimeForecast(low, likely, high, source)


def _micro_batches(work: Work) -> int:
    """Return the micro-batches of an optimizer step in one process."""
    rows_of_process = -(-int(work.train["global_batch_size"]) // work.settings.num_processes)
    return -(-rows_of_process // work.micro_batch_size)


def num_steps(work: Work) -> int:
    """Return the optimizer steps of the training."""
    assert work.lengths is not None
    steps_per_epoch = -(-work.lengths.rows // int(work.train["global_batch_size"]))
    return int(work.train["max_steps"] or math.ceil(work.train["epochs"] * steps_per_epoch))


def num_tokens(work: Work) -> int:
    """Return the tokens that the training reads."""
    assert work.lengths is not None
    train, lengths = work.train, work.lengths
    if train["max_steps"] is None:
        return round(float(train["epochs"]) * lengths.tokens)
    rows = int(train["max_steps"]) * int(train["global_batch_size"])
    return round(rows * lengths.tokens / lengths.rows)


def flop_per_token(shape: ModelShape, settings: Settings, lengths: RowLengths) -> float:
    """Return the operations of a token, forward and backward, of a frozen base with an adapter.

    A frozen weight takes part in two products of two operations: forward, and the gradient of its input. Recomputed
    layers add a forward pass; logits exist where there is a loss. Attention and the adapter are a few percent.
    """
    recomputed = 1 / settings.checkpoint_every if settings.checkpoint_every else 0.0
    head = 4 * shape.width * shape.vocabulary * lengths.supervised / max(1, lengths.tokens)
    return (4 + 2 * recomputed) * shape.layer_weights + head
