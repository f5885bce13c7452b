"""Bounds on the time and the memory of work whose size somebody else decides: a template, a packed file, a pattern.

`Bounds` is for code that Python can interrupt: the kernel counts what the process allocates (RLIMIT_DATA) and how long
it computes (a timer of processor time, whose signal raises). `Watchdog` is for native code that cannot be interrupted
and lets other threads run: a thread counts its processor time and its memory, and ends the process with the exit code
and the reason of an error of usage.

Both are no protection against code that runs in this process; that is refused before it is loaded (`core.safety`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from types import FrameType, TracebackType
from typing import NoReturn

_PAGE_BYTES = resource.getpagesize()
_RSS, _DATA = 1, 5  # places in /proc/self/statm, in pages
_POLL_SECONDS = 0.1
_last_data_bytes, _last_asked = 0, float("-inf")


class TimeIsUp(BaseException):
    """Processor time ran out; no `except Exception` of the interrupted code may swallow it."""


class Bounds:
    """A context that may allocate and compute so much more; above it, `MemoryError` or `TimeIsUp` is raised."""

    def __init__(self, extra_bytes: int, seconds: float | None = None) -> None:
        self.extra_bytes, self.seconds = extra_bytes, seconds
        self._previous_limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        self._has_timer = False

    def __enter__(self) -> Bounds:
        """Begin to count."""
        self._previous_limits = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if sys.platform == "linux":  # elsewhere the kernel does not count
            limit = _recent_data_bytes() + self.extra_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (min(limit, soft) if soft >= 0 else limit, hard))
        # Python delivers signals to the main thread alone.
        self._has_timer = self.seconds is not None and threading.current_thread() is threading.main_thread()
        if self._has_timer:
            _install_handler()
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds or 0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Lift the bounds."""
        if self._has_timer:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        resource.setrlimit(resource.RLIMIT_DATA, self._previous_limits)


@cache
def _install_handler() -> None:
    # Once, because a rendering takes 30 us and this one. A process that is forked inherits it.
    signal.signal(signal.SIGVTALRM, _raise_time_is_up)


def _raise_time_is_up(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeIsUp


def _recent_data_bytes() -> int:
    """Return the memory that the kernel counts, as it was at most a tenth of a second ago: asking takes 15 us."""
    global _last_data_bytes, _last_asked
    if (now := time.monotonic()) - _last_asked > _POLL_SECONDS:
        _last_data_bytes, _last_asked = _statm(_DATA), now
    return _last_data_bytes


def _statm(place: int) -> int:
    """Return a size of this process in bytes."""
    # Opened anew: a file that was opened before a fork tells of the parent.
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 256).split()[place]) * _PAGE_BYTES
    finally:
        os.close(descriptor)


def _exit_with_usage_error(reason: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{reason}\n".encode())
    os._exit(12)


class Watchdog:
    """A context in which native code may compute so long and take so much memory; above it, the process ends.

    Processor time is counted, and not the time of a clock: on a busy machine the same work takes many times as long.

    Attributes:
        end_process: Gets the reason. A step replaces it, so that its ending is written first.
    """

    end_process: Callable[[str], None] = staticmethod(_exit_with_usage_error)
    _lock = threading.Lock()
    _thread: threading.Thread | None = None
    _owner_pid = 0
    _current: Watchdog | None = None

    def __init__(self, extra_bytes: int, seconds: float, reason: str) -> None:
        self.extra_bytes, self.seconds, self.reason = extra_bytes, seconds, reason
        self._deadline, self._max_bytes = 0.0, 0

    def __enter__(self) -> Watchdog:
        """Begin to watch; one thread does so for the whole process."""
        self._deadline = time.process_time() + self.seconds
        self._max_bytes = _statm(_RSS) + self.extra_bytes if sys.platform == "linux" else sys.maxsize
        Watchdog._current = self
        # Threads do not survive a fork.
        if Watchdog._owner_pid != os.getpid():
            with Watchdog._lock:
                Watchdog._owner_pid = os.getpid()
                Watchdog._thread = threading.Thread(target=_watch, name="watchdog", daemon=True)
                Watchdog._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching."""
        Watchdog._current = None

    def is_exceeded(self) -> bool:
        """Return whether the processor time, of all threads of the process, or the memory is used up."""
        if time.process_time() > self._deadline:
            return True
        return sys.platform == "linux" and _statm(_RSS) > self._max_bytes


def _watch() -> None:
    while True:
        time.sleep(_POLL_SECONDS)
        current = Watchdog._current
        if current is not None and current.is_exceeded() and Watchdog._current is current:
            Watchdog.end_process(current.reason)
            return
