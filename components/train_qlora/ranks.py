"""The processes that train together, as one of them sees it: which one it is, and what all of them agree on.

Where one process trains alone there is no process group, and every answer is its own. What is agreed on travels between
host memories (gloo on loopback), never through a GPU. Each call is made by all processes, or the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


def number() -> int:
    """Which process this is; 0 talks, saves and writes."""
    return int(distributed.get_rank()) if distributed.is_initialized() else 0


def count() -> int:
    """How many there are."""
    return int(distributed.get_world_size()) if distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the one that talks, saves and writes."""
    return number() == 0


def summed(*values: float) -> list[float]:
    """Each value, summed over all processes: the same numbers, bit for bit, in every one."""
    if count() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(found)
    return [float(value) for value in found.tolist()]


def any_of(*flags: bool) -> list[bool]:
    """Each flag, raised where it is raised in any process."""
    return [total > 0 for total in summed(*map(float, flags))]


def together() -> None:
    """Wait until every process is here."""
    summed(0.0)


def gathered(value: Value) -> list[Value]:
    """What each process has, in their order."""
    found: list[Any] = [value] * count()
    if count() > 1:
        distributed.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], Value]) -> Value:
    """What the first process makes, for all."""
    found = [make() if first() else None]
    if count() > 1:
        distributed.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


class Wrapped:
    """A model inside DDP: its forward pass goes through DDP, which then adds up gradients; all else is its own."""

    def __init__(self, outside: Any, model: Any) -> None:
        self.outside, self.model = outside, model

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass."""
        return self.outside(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
