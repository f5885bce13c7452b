"""Choose the micro-batch size by an estimate and one measured step, where the line leaves it open.

With `micro_batch_size: auto` training begins with the planner's estimate for the memory at hand, measures one step of
that size, and corrects the estimate by it. The rows of an optimizer step, its loss and its gradients stay the same:
they are only cut in another way.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from components.train_qlora import history, packing
from components.train_qlora.batching import AUTO_START_ROWS, divisors, with_micro_batch_size
from components.train_qlora.data import Batch, PaddingCollator
from components.train_qlora.loss import summed_loss
from components.train_qlora.micro_batches import prepare
from components.train_qlora.optimizer import MASTER_PART
from components.train_qlora.processes import cgroup, distributed
from components.train_qlora.step_estimate import StepEstimate
from components.train_qlora.training_run import TrainingRun
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress
from qlora_retrain.lm import memory, oom

# The rest is for what a measured step does not show: fragments, a batch of another shape.
MEMORY_FRACTION = 0.85
# A step that seems to take less than this fraction of the estimate used memory that was free inside the process.
MIN_CORRECTION = 0.5


def resolve_micro_batch_size(run: TrainingRun) -> TrainConfig:
    """Return the run's config with a number for `auto`; a config that has one stays as it is.

    Every process measures the same rows, the longest ones, and all use the size that fits into each of them. If memory
    runs out, a smaller size is measured, and none is used that is as large as the one that failed.
    """
    config, sizes = run.config, divisors(run.config)
    if config.micro_batch_size != "auto":
        return config
    estimate = StepEstimate.from_run(run, sizes[-1])
    free_bytes = MEMORY_FRACTION * memory_limit_bytes(config) - _used_bytes(config) - _optimizer_bytes(run)

    start = size = _common_size(sizes, estimate.rows_within(free_bytes) if estimate else AUTO_START_ROWS)
    while (measured := _try_to_measure(run, size, may_fail=size > sizes[0])) is None:
        sizes = [smaller for smaller in sizes if smaller < size]
        size = _largest_size(sizes, size // 2)

    tokens, step_bytes = measured
    if estimate:
        correction = step_bytes / estimate.step_bytes(size, tokens)
        rows = estimate.rows_within(free_bytes / max(correction, MIN_CORRECTION))
    else:
        rows = int(max(0.0, free_bytes) // (step_bytes / tokens * max(run.rows.train.lengths)))
    corrected = _common_size(sizes, rows)

    _note(run, corrected)
    source = "by the planner's estimate" if estimate else "to begin with, since the planner does not know this family"
    progress.say(
        f"train.micro_batch_size: auto; {start} rows {source}; a measured step over the {size} longest rows took "
        f"{step_bytes / 2**20:.0f} MiB, and {max(free_bytes, 0) / 2**20:.0f} MiB may be used: {corrected} rows, "
        f"{config.global_batch_size // corrected} micro-batches per step"
    )
    return with_micro_batch_size(config, corrected)


def _largest_size(sizes: list[int], rows: int) -> int:
    """Return the largest of these ascending sizes that has at most so many rows; the first where none has."""
    return max([size for size in sizes if size <= rows], default=sizes[0])


def _common_size(sizes: list[int], rows: int) -> int:
    """Return the largest size that has at most so many rows in each process, of which each has its own number."""
    return _largest_size(sizes, min(distributed.all_gather(rows)))


def memory_limit_bytes(config: TrainConfig) -> float:
    """Return how much memory this process may have in all: its GPU's, or its share of the container's or the host's."""
    if config.device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        return float(free_bytes + torch.cuda.memory_reserved())
    available_kib = int(_proc_field(Path("/proc/meminfo"), "MemAvailable"))
    host_bytes = (available_kib + int(_proc_field(Path("/proc/self/status"), "VmRSS"))) * 1024
    limit_mib = cgroup.limit_mib()
    return min(host_bytes, math.inf if limit_mib is None else limit_mib * 2**20) / config.num_processes


def _used_bytes(config: TrainConfig) -> int:
    """Return the memory that this process uses now."""
    if config.device == "cuda":
        return int(torch.cuda.memory_allocated())
    return int(_proc_field(Path("/proc/self/status"), "VmRSS")) * 1024


def _optimizer_bytes(run: TrainingRun) -> int:
    """Return the bytes of gradients and optimizer states, which do not exist before the first step."""
    gradients: int = sum(parameter.nbytes for parameter in run.optimizer.parameters.values())
    # Masters exist already.
    states: int = sum(
        t.nbytes for name, t in run.optimizer.empty_state().items() if not name.endswith(f".{MASTER_PART}")
    )
    # DDP has a buffer for gradients, too.
    return gradients * (2 if run.config.num_processes > 1 else 1) + states


def _try_to_measure(run: TrainingRun, size: int, *, may_fail: bool) -> tuple[int, int] | None:
    """Measure a step over the longest rows; return None where memory runs out in any process.

    Where that must not happen, or with FSDP, whose processes wait for each other within a step, the error ends the
    process, and the step begins again with half the size.
    """
    _note(run, size)
    lengths = run.rows.train.lengths
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:size]
    batch = PaddingCollator(run.rows.pad_token_id)([run.rows.train[i] for i in longest])

    measured = None
    try:
        measured = _measure(run.model, batch)
    except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
        if not may_fail or run.config.parallel == "fsdp" or not oom.is_out_of_memory(error):
            raise
    if all(distributed.all_gather(measured is not None)):
        return measured

    run.model.zero_grad()
    memory.release_dropped_models()  # what the failed step had allocated
    progress.say(f"train.micro_batch_size: auto; out of memory in a measured step over the {size} longest rows")
    return None


def _measure(model: Any, batch: Batch) -> tuple[int, int]:
    """Run forward and backward once, and forget the gradients and the draws of dropout.

    Returns:
        The tokens that were computed, and the bytes that the step added to those in use.
    """
    is_gpu = model.device.type == "cuda"
    micro_batch = prepare(model, {name: tensor for name, tensor in batch.items() if name != "row_indices"})
    with torch.random.fork_rng(devices=[model.device] if is_gpu else []):
        model.train()
        used_bytes = _begin_peak(is_gpu=is_gpu)
        with packing.packed_attention(model):  # also around backward, which recomputes checkpointed layers
            summed_loss(model, micro_batch).backward()
        peak_bytes = _peak_bytes(is_gpu=is_gpu)
    model.zero_grad()
    return micro_batch.inputs["input_ids"].numel(), max(peak_bytes - used_bytes, 1)


def _begin_peak(*, is_gpu: bool) -> int:
    """Forget the peak so far, and return the bytes in use."""
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    # proc(5): "5" makes the present size the peak. Where that is not allowed, the earlier peak may be taken for this
    # step's, and the size that is chosen is smaller than it could be.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(_proc_field(Path("/proc/self/status"), "VmRSS")) * 1024


def _peak_bytes(*, is_gpu: bool) -> int:
    if is_gpu:
        return int(torch.cuda.max_memory_allocated())
    return int(_proc_field(Path("/proc/self/status"), "VmHWM")) * 1024


def _proc_field(path: Path, name: str) -> str:
    """Return the number of the line `name: number kB`."""
    return next(line.split()[1] for line in path.read_text(encoding="ascii").split("\n") if line.startswith(f"{name}:"))


def _note(run: TrainingRun, size: int) -> None:
    if distributed.is_main():
        history.note_micro_batch_size(run.scratch, size)
