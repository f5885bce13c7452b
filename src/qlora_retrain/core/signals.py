"""SIGTERM and SIGINT as requests to stop: a flag that a step polls, or an exception at once.

A step with scratch (training) calls `stop_requested()` between its units of work, saves, and raises `TryAgain`. Every
other step is interrupted at once by an exception, because it has nothing worth saving.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from qlora_retrain.core.errors import Cause, TryAgain

# A variable of the module, because a signal is sent to the process as a whole.
_requested = False


class StoppedBySignal(TryAgain):
    """Raised by the signal handler, so it can come from any line. Code that handles errors must let it pass."""

    default_cause = Cause.PREEMPTED


def stop_requested() -> bool:
    """Return whether the process was asked to stop."""
    return _requested


def install(*, graceful: bool, ignore_repeat: bool = False) -> None:
    """Handle SIGTERM and SIGINT.

    Args:
        graceful: Only remember the first signal, so that the step has time to save.
        ignore_repeat: Ignore a second signal too, where another process decides when the time is over.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        global _requested
        # A second signal means that the sender does not want to wait: it interrupts a graceful step as well.
        if not graceful or (_requested and not ignore_repeat):
            _requested = True
            raise StoppedBySignal(f"stopped by {signal.Signals(number).name}; run the same command again to continue")
        _requested = True

    global _requested
    _requested = False  # of an earlier step of this process
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def ignore() -> None:
    """Ignore SIGTERM and SIGINT from now on, also while the interpreter shuts down; the process is about to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM interrupt the block as SIGINT does, so that it leaves what it would leave after Ctrl-C."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
