"""Run a command that ends when asked, and with whoever started it. Standard library only; run as a file.

Airflow gives a task five seconds between SIGTERM and SIGKILL, a training step wants a minute to save a checkpoint, and
a worker that is killed with -9 tells nobody. So this small process stands between: it starts the command in a session
of its own, passes one SIGTERM on (its own, or the death of its parent, which Linux reports as one), allows a grace
period, then kills the whole session. Whatever the command leaves behind in its session goes with it.

Exit code: the command's; 128+n where signal n ended it.
Command: `python leash.py PARENT_PID GRACE_SECONDS COMMAND...`
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
ASKS = (signal.SIGTERM, signal.SIGINT)


def command(arguments: Sequence[str], *, grace_seconds: float) -> list[str]:
    """The argument list that runs `arguments` on a leash held by this process."""
    return [sys.executable, "-I", str(Path(__file__)), str(os.getpid()), str(grace_seconds), *arguments]


def die_with(parent: int, number: int) -> None:
    """Have the kernel send signal `number` to this process when `parent` ends; exit where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(128 + number)


def kill_session(leader: int) -> None:
    """Kill every process of a session, also those that made a group of their own (Airflow's tasks do)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


def run(parent: int, grace_seconds: float, arguments: Sequence[str]) -> int:
    """Run the command to its end and return its exit code."""
    asked = False
    # What arrives before there is a child waits until the handlers can pass it on.
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKS)
    die_with(parent, signal.SIGTERM)
    child = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(_begin, os.getpid()),  # noqa: PLW1509 - one thread and no locks here
    )

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:  # a step takes a second SIGTERM as impatience
            asked = True
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)

    for number in ASKS:
        signal.signal(number, ask)
    signal.signal(signal.SIGALRM, lambda number, frame: kill_session(child.pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS)
    code = child.wait()
    kill_session(child.pid)
    return 128 - code if code < 0 else code


def _begin(parent: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS)
    die_with(parent, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
