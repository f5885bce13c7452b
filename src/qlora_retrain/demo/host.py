"""Helpers for a process that starts others on its machine: a lock, a free port, the end of a log, a clean end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections import deque
from pathlib import Path
from typing import IO

from qlora_retrain.core.errors import UsageError

MARKER_VARIABLE = "QLORA_RETRAIN_EMBEDDED"


def acquire_lock(home: Path) -> IO[str]:
    """Lock AIRFLOW_HOME; the kernel releases the lock when this process ends, however it ends."""
    lock = (home / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UsageError(
            f"{home}: another Airflow runs there already; stop it, or choose another folder with --home"
        ) from error
    return lock


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        # Another process could take the port before Airflow does; then the API server ends and `start` says so.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    with log.open(errors="replace") as stream:
        return "".join(deque(stream, lines)).strip()


def kill_marked_processes(marker: str) -> None:
    """Kill every process that has our marker in its environment, e.g. a step that did not end with its task."""
    # Linux shows the environment that a process started with, as NUL-separated entries.
    marker_entry = f"{MARKER_VARIABLE}={marker}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker_entry in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
