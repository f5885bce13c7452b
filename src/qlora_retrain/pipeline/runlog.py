"""Save a step's output in the run's folder: its log when it ends, its progress while it works.

runs/<run_id>/logs/<step>-<id>.log      everything the step printed, written when it ends
runs/<run_id>/status/<step>.json        the last progress update, a few seconds old at most
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Problem
from qlora_retrain.core.visible_text import escape_controls
from qlora_retrain.storage.store import Store

_STATUS_EVERY_SECONDS = 2.0


class _Tee:
    """A text stream that also writes to a log; every other method is the stream's own."""

    def __init__(self, stream: TextIO, log: IO[str]) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if not self._log.closed:  # a logger may hold on to this stream for longer than the step
            self._log.write(escape_controls(text))
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def capture_output(store: Store, run_id: str, step: str) -> Iterator[None]:
    """Save what a step prints in the block; losing a log never fails a step."""
    run, log_name = f"runs/{run_id}", f"{step}-{uuid.uuid4().hex[:8]}.log"
    last_upload = 0.0

    def upload_status(update: progress.Update) -> None:
        nonlocal last_upload
        # Training reports several times a second, and each upload is a request to the store.
        if time.monotonic() - last_upload < _STATUS_EVERY_SECONDS and update["done"] != update["total"]:
            return
        last_upload = time.monotonic()
        with _never_fails():
            (folder / f"{step}.json").write_text(json.dumps(dict(update)))
            store.upload(folder, f"{run}/status", [f"{step}.json"])

    with tempfile.TemporaryDirectory(prefix="qlora-retrain-log-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        streams = (sys.stdout, sys.stderr)
        try:
            with (
                (folder / log_name).open("w", encoding="utf-8", errors="replace") as log,
                progress.subscribe(upload_status),
            ):
                # Only Python's streams: what a library prints from C goes to the container's log alone.
                sys.stdout, sys.stderr = _Tee(streams[0], log), _Tee(streams[1], log)
                yield
        finally:
            sys.stdout, sys.stderr = streams
            with _never_fails():
                store.upload(folder, f"{run}/logs", [log_name])


@contextlib.contextmanager
def _never_fails() -> Iterator[None]:
    """Ignore errors, since a lost log must not fail a step; a request to stop is raised."""
    try:
        yield
    except signals.StoppedBySignal:
        raise
    except (Problem, OSError):
        pass
