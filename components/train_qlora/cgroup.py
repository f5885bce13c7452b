"""What the kernel tells of this process's control group: kills for memory, and the limit.

Both versions of cgroups(7) are read: a node may have either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OF_THIS_PROCESS = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")
EVENTS = ("memory.events", "memory.oom_control")  # version 2, version 1; both have a line `oom_kill N`
LIMITS = ("memory.max", "memory.limit_in_bytes")
NO_LIMIT = 2**62  # version 1 says it with the largest number of whole pages


def kills() -> int | None:
    """How many processes of the group were ever killed for memory; None where the kernel does not tell."""
    for text in _found(EVENTS):
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def limit_mib() -> int | None:
    """How much memory the group may hold; None where it has no limit of its own."""
    for text in _found(LIMITS):
        if text.strip().isdigit() and int(text) < NO_LIMIT:
            return int(text) // 2**20
    return None


def _found(names: tuple[str, ...]) -> Iterator[str]:
    """The texts of such files that are there."""
    for folder in _folders():
        for name in names:
            try:
                yield (folder / name).read_text(encoding="ascii")
            except OSError:
                continue


def _folders() -> Iterator[Path]:
    """Where the group's files may be. A container that sees the names of its host has its own group mounted on top."""
    try:
        lines = OF_THIS_PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            mounted = MOUNTED / "memory" if controllers else MOUNTED
            yield mounted / path.lstrip("/")
            yield mounted
