"""Read what the kernel says about memory in this process's control group: OOM kills so far, and the limit.

Both versions of cgroups(7) are read, since a node may have either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SELF_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# File names of version 2, then of version 1; both event files have a line `oom_kill N`.
OOM_EVENT_FILES = ("memory.events", "memory.oom_control")
LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
# Version 1 reports "no limit" as the largest number of whole pages.
UNLIMITED_BYTES = 2**62


def oom_kills() -> int | None:
    """Return how many processes of the group the kernel has killed for memory; None where it keeps no count."""
    for text in _texts(OOM_EVENT_FILES):
        for line in text.split("\n"):
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def limit_mib() -> int | None:
    """Return the group's memory limit; None where it has none of its own."""
    for text in _texts(LIMIT_FILES):
        if text.strip().isdigit() and int(text) < UNLIMITED_BYTES:
            return int(text) // 2**20
    return None


def _texts(file_names: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of each of these files that exists."""
    for folder in _folders():
        for name in file_names:
            try:
                yield (folder / name).read_text(encoding="ascii")
            except OSError:
                # The file is of the other version, or this is the root group, which has no such files.
                continue


def _folders() -> Iterator[Path]:
    """Yield the folders where the group's files may be."""
    try:
        lines = SELF_CGROUP.read_text(encoding="utf-8").split("\n")
    except OSError:
        # No control groups on this machine.
        return

    for line in filter(None, lines):
        _, controllers, path = line.split(":", 2)
        # Version 2 has one line with an empty list of controllers; version 1 has a line for each hierarchy.
        if not controllers or "memory" in controllers.split(","):
            mount = CGROUP_ROOT / "memory" if controllers else CGROUP_ROOT
            yield mount / path.lstrip("/")
            # A container may see its group under the host's path, while its own group is mounted at the top.
            yield mount
