"""Send the losses to trackers (MLflow, Weights & Biases) from processes of their own, which training never waits for.

A tracker's client retries for minutes where its server is away, and joins its threads when the interpreter ends. In a
process of its own it can do so: training hands it lines and goes on. What a tracker cannot do is a warning. Only a
package or a key that is missing is refused (12), before anything is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from components.train_qlora.processes import distributed
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals

# Lines that wait for a tracker's process; further ones are dropped.
MAX_WAITING = 10_000
# How long a tracker may still send once training has ended: a healthy one, one of a step that was asked to stop, whose
# checkpoint has to be uploaded before it is killed, and one that has not answered.
CLOSE_SECONDS, CLOSE_SECONDS_STOPPED, CLOSE_SECONDS_AWAY = 30.0, 3.0, 1.0
POLL_SECONDS = 0.02


class Tracker:
    """One tracker's process. No method raises, and none waits but `close`.

    Args:
        name: `mlflow` or `wandb`.
        settings: What the tracker shows as the run's settings.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.is_away = self.is_dropping = False
        self.lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        # The process imports what this one can import.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "components.train_qlora.trackers.client_process", name, str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in self.threads:
            thread.start()
        self._put({"settings": settings})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the numbers of a step."""
        self._put({"step": step, "values": dict(values)})

    def close(self, *, succeeded: bool) -> None:
        """End the tracker's run, and its process."""
        self._put({"succeeded": succeeded})
        # A full queue has no place for the end; the process is killed below.
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(None)
        begin = time.monotonic()
        while self.process.poll() is None and time.monotonic() - begin < self._close_seconds:
            time.sleep(POLL_SECONDS)
        if self.process.returncode != 0:
            progress.say(f"warning: train.report_to: {self.name} did not take everything in time; the rest is lost")
        self.process.kill()
        self.process.wait()
        for thread, pipe in zip(self.threads, (self.process.stdin, self.process.stdout), strict=True):
            thread.join(timeout=1)
            # What could not be written is lost with the process.
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    @property
    def _close_seconds(self) -> float:
        if self.is_away:
            return CLOSE_SECONDS_AWAY
        return CLOSE_SECONDS_STOPPED if signals.stop_requested() else CLOSE_SECONDS

    def _put(self, record: Mapping[str, Any]) -> None:
        try:
            self.lines.put_nowait(json.dumps(record, default=str) + "\n")
        except queue.Full:
            if not self.is_dropping:
                progress.say(f"warning: train.report_to: {self.name} is too slow; further numbers are dropped")
            self.is_dropping = True

    def _write(self) -> None:
        assert self.process.stdin is not None
        # A process that has ended says why by its last line.
        with contextlib.suppress(OSError, ValueError):
            while (line := self.lines.get()) is not None:
                self.process.stdin.write(line)
                self.process.stdin.flush()
            self.process.stdin.close()

    def _read(self) -> None:
        """Print each change of the tracker's state, as its process reports it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self._report(json.loads(line).get("error"))

    def _report(self, error: str | None) -> None:
        if error and not self.is_away:
            progress.say(
                f"warning: train.report_to: {self.name} cannot be used now, and training goes on without it: {error}"
            )
        elif self.is_away and not error:
            progress.say(f"train.report_to: {self.name} can be used again, and has what it missed")
        self.is_away = bool(error)


class Trackers:
    """The trackers of a run, any number of them."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the numbers of an optimizer step, or of an evaluation after it, to each."""
        for tracker in self.trackers:
            tracker.log(step, values)


@contextlib.contextmanager
def started(config: TrainConfig) -> Iterator[Trackers]:
    """Yield the line's trackers; their runs end with the block, as failed where it raises."""
    # Every process has the same losses, so one of them reports.
    names = list(dict.fromkeys(config.report_to)) if distributed.is_main() else []
    trackers: list[Tracker] = []
    for name in names:
        try:
            trackers.append(Tracker(name, config.model_dump(mode="json")))
        # A container may be at its limit of processes or threads.
        except (OSError, RuntimeError) as error:
            progress.say(f"warning: train.report_to: {name} cannot start, and training goes on without it: {error}")
    succeeded = False
    try:
        yield Trackers(trackers)
        succeeded = True
    finally:
        for tracker in trackers:
            tracker.close(succeeded=succeeded)
