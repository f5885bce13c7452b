"""Choose the micro-batch size by one measured step, where the line leaves it open (`micro_batch_size: auto`).

The rows of an optimizer step, its loss and its gradients stay the same: they are only cut in another way.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from components.train_qlora import history, packing
from components.train_qlora.batching import divisors, process_micro_batch_size, with_micro_batch_size
from components.train_qlora.data import Batch, PaddingCollator
from components.train_qlora.loss import summed_loss
from components.train_qlora.micro_batches import prepare
from components.train_qlora.processes import cgroup, distributed
from components.train_qlora.training_run import TrainingRun
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress

# The rest is for what a measured step does not show: fragments, a batch of another shape.
MEMORY_FRACTION = 0.85


def resolve_micro_batch_size(run: TrainingRun) -> TrainConfig:
    """Return the run's config with a number for `auto`; a config that has one stays as it is.

    Every process measures the same rows, the longest ones, and all use the size that fits into each of them. What the
    memory holds grows with the tokens of a micro-batch. If memory runs out here, the step tries smaller sizes.
    """
    config, sizes = run.config, divisors(run.config)
    if config.micro_batch_size != "auto":
        return config
    start = max(size for size in sizes if size <= process_micro_batch_size(config))
    _note(run, start)

    lengths = run.rows.train.lengths
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:start]
    batch = PaddingCollator(run.rows.pad_token_id)([run.rows.train[i] for i in longest])
    tokens, held_bytes, step_bytes = _measure(run.model, batch)
    free_bytes = MEMORY_FRACTION * memory_limit_bytes(config) - held_bytes

    own_size = largest_size(sizes, free_bytes, step_bytes / tokens * max(lengths))
    size = min(distributed.all_gather(own_size))
    _note(run, size)
    progress.say(
        f"train.micro_batch_size: auto; a measured step over the {len(longest)} longest rows took "
        f"{step_bytes / 2**20:.0f} MiB, and {max(free_bytes, 0) / 2**20:.0f} MiB may be used: {size} rows, "
        f"{config.global_batch_size // size} micro-batches per step"
    )
    return with_micro_batch_size(config, size)


def largest_size(sizes: list[int], free_bytes: float, row_bytes: float) -> int:
    """Return the largest of these ascending sizes whose rows fit; the first where not one does."""
    return max([size for size in sizes if size * row_bytes <= free_bytes], default=sizes[0])


def memory_limit_bytes(config: TrainConfig) -> float:
    """Return how much memory this process may have in all: its GPU's, or its share of the container's or the host's."""
    if config.device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        return float(free_bytes + torch.cuda.memory_reserved())
    available_kib = int(_proc_field(Path("/proc/meminfo"), "MemAvailable"))
    host_bytes = (available_kib + int(_proc_field(Path("/proc/self/status"), "VmRSS"))) * 1024
    limit_mib = cgroup.limit_mib()
    return min(host_bytes, math.inf if limit_mib is None else limit_mib * 2**20) / config.num_processes


def _measure(model: Any, batch: Batch) -> tuple[int, int, int]:
    """Run forward and backward once, and forget the gradients and the draws of dropout.

    Returns:
        The tokens that were computed, the bytes that this process held before, and those that the step added.
    """
    is_gpu = model.device.type == "cuda"
    micro_batch = prepare(model, {name: tensor for name, tensor in batch.items() if name != "row_indices"})
    with torch.random.fork_rng(devices=[model.device] if is_gpu else []):
        model.train()
        held_bytes = _begin_peak(is_gpu=is_gpu)
        with packing.packed_attention(model):  # also around backward, which recomputes checkpointed layers
            summed_loss(model, micro_batch).backward()
        peak_bytes = _peak_bytes(is_gpu=is_gpu)
    model.zero_grad()
    return micro_batch.inputs["input_ids"].numel(), held_bytes, max(peak_bytes - held_bytes, 1)


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
