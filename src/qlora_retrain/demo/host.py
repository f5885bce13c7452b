"""Helpers for a process that starts others on its machine: a lock, a free port, the end of a log, a clean end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO

from qlora_retrain.core.errors import UsageError

MARKER_VARIABLE = "QLORA_RETRAIN_EMBEDDED"
_KILL_SECONDS = 30.0


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


def reserve_port() -> tuple[int, socket.socket]:
    """Return a port of the loopback, and a socket that holds it: while it is open, others who ask for one get another.

    It does not listen. A server that is told the port, and sets SO_REUSEADDR as servers do, listens there all the same.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    port = int(reservation.getsockname()[1])
    if sys.platform != "linux":  # other kernels would keep that server out, too
        reservation.close()
    return port, reservation


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    with log.open(errors="replace") as stream:
        return "".join(deque(stream, lines)).strip()


def kill_marked_processes(marker: str) -> None:
    """Kill every process that has our marker in its environment, e.g. a step that did not end with its task.

    They are gone when this returns, but for one that the kernel does not let go in that time.
    """
    deadline = time.monotonic() + _KILL_SECONDS
    while _send_kill(marker) and time.monotonic() < deadline:
        time.sleep(0.05)


def _send_kill(marker: str) -> bool:
    """Send SIGKILL to every process with the marker; return whether there was one."""
    is_there = False
    # Linux shows the environment that a process started with, as NUL-separated entries.
    marker_entry = f"{MARKER_VARIABLE}={marker}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker_entry in entry.read_bytes().split(b"\0"):
                is_there = True
                os.kill(int(entry.parent.name), signal.SIGKILL)
    return is_there
