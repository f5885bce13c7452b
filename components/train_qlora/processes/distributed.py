"""Collectives over the processes that train together: rank, world size, sums, gathers and broadcasts.

A single process has no process group, and every function then answers for that process alone. Values travel between
host memories (gloo on loopback), never through a GPU. Every process must make each call: a collective waits for all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


def rank() -> int:
    """Return the number of this process; rank 0 prints, saves and writes."""
    return int(dist.get_rank()) if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return int(dist.get_world_size()) if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that prints, saves and writes."""
    return rank() == 0


def all_reduce_sum(*values: float) -> list[float]:
    """Sum each value over all processes; every process gets the same numbers, bit for bit."""
    if world_size() == 1:
        return list(values)
    # float64 holds counts of tokens exactly, up to 2**53.
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return [float(total) for total in totals.tolist()]


def all_reduce_any(*flags: bool) -> list[bool]:
    """Return, for each flag, whether it is true in any process."""
    return [total > 0 for total in all_reduce_sum(*map(float, flags))]


def barrier() -> None:
    """Wait until every process has called this."""
    # A sum over host memories: with NCCL in the group, torch's own barrier would put work on the GPU.
    all_reduce_sum(0.0)


def all_gather(value: Value) -> list[Value]:
    """Return the value of each process, in the order of their ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(make: Callable[[], Value]) -> Value:
    """Call `make` in the main process only and return its result in every process."""
    values = [make() if is_main() else None]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


class ForwardThroughDDP:
    """Run a model's forward pass through DDP, which then averages the gradients; all else is the model's own."""

    def __init__(self, model: Any, device: str) -> None:
        # All processes read the same base from disk, so nothing but the adapter is synchronized.
        frozen_names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        model._ddp_params_and_buffers_to_ignore = frozen_names + [name for name, _ in model.named_buffers()]
        device_ids = [rank()] if device == "cuda" else None
        self.model, self.ddp_model = model, DistributedDataParallel(model, device_ids=device_ids)

    def no_sync(self) -> AbstractContextManager[None]:
        """Keep the gradients of this process to itself in backward passes inside the context."""
        context: AbstractContextManager[None] = self.ddp_model.no_sync()
        return context

    def __call__(self, **inputs: Any) -> Any:
        """Run a forward pass."""
        return self.ddp_model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
