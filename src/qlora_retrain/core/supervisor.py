"""Run a command so that it can save its work when it is stopped, and never outlives its parent. Run as a file.

Airflow gives a task five seconds between SIGTERM and SIGKILL, and a training step needs a minute to save a checkpoint.
A worker that is killed by SIGKILL cannot stop its command at all. So this process runs between the two. It needs only
the standard library:

- It starts the command in a session of its own.
- It passes one SIGTERM on: the one that it gets itself, or the one that Linux sends to it when its parent ends.
- After a grace period it kills the whole session, and with it every process that the command left there.

Exit code: the command's; 128+n where signal n ended it.
Command: `python supervisor.py PARENT_PID GRACE_SECONDS COMMAND...`
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

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def supervised_command(arguments: Sequence[str], *, grace_seconds: float) -> list[str]:
    """Return the argument list that runs `arguments` under a supervisor whose parent is this process."""
    # -I: the command's environment (PYTHONPATH, a startup file) must not reach the supervisor itself.
    return [sys.executable, "-I", str(Path(__file__)), str(os.getpid()), str(grace_seconds), *arguments]


def exit_with_parent(parent: int, number: int) -> None:
    """Have the kernel send signal `number` to this process when `parent` ends; exit if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    # The parent may have ended before the call above; then the kernel sends nothing any more.
    if os.getppid() != parent:
        os._exit(128 + number)


def kill_session(leader: int) -> None:
    """Kill every process of a session, including those in a process group of their own (Airflow makes such groups)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)

    # killpg reaches one group only. No system call kills a session, so its processes are looked up in /proc.
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


def run(parent: int, grace_seconds: float, arguments: Sequence[str]) -> int:
    """Run the command to its end and return its exit code."""
    stop_requested = False
    # A signal that arrives before there is a child stays pending until the handlers can pass it on.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    exit_with_parent(parent, signal.SIGTERM)
    child = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=partial(_prepare_child, os.getpid()),  # noqa: PLW1509 - one thread and no locks here
    )

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop_requested
        # Passed on once, because a step treats a second SIGTERM as a request to end without saving.
        if not stop_requested:
            stop_requested = True
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)

    for number in STOP_SIGNALS:
        signal.signal(number, request_stop)
    # The timer sends SIGALRM at the end of the grace period.
    signal.signal(signal.SIGALRM, lambda number, frame: kill_session(child.pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    code = child.wait()
    # Whatever the command left running in its session, a data loader for example, ends with it.
    kill_session(child.pid)
    # Popen reports the end by signal n as -n; a shell and Kubernetes report 128 + n.
    return 128 - code if code < 0 else code


def _prepare_child(parent: int) -> None:
    """Undo the signal mask in the child, and have it killed when the supervisor is."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    exit_with_parent(parent, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
