"""SIGTERM and SIGINT as something a step can ask about.

A step with scratch (training) asks `requested()` between its units of work, saves and raises `TryAgain`. Every other
step is interrupted at once: it has nothing worth saving.
"""

from __future__ import annotations

import signal
from types import FrameType

from qlora_retrain.core.errors import TryAgain

_requested = False


class Stopped(TryAgain):
    """Raised from the signal's handler, so at any line: nothing may take it for a problem of its own."""


def requested() -> bool:
    """Whether the process was asked to stop."""
    return _requested


def install(*, polite: bool, patient: bool = False) -> None:
    """Handle SIGTERM and SIGINT.

    Args:
        polite: Leave the step time to save.
        patient: Also at a second signal: another process decides when the time is over.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        global _requested
        if not polite or (_requested and not patient):
            _requested = True
            raise Stopped(f"stopped by {signal.Signals(number).name}; run the same command again to go on")
        _requested = True

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
