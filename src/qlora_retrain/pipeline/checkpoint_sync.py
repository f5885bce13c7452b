"""Checkpoints that outlive their process: restored before a step with scratch runs, uploaded while it does.

    scratch/<step>/<key>/<attempt>/checkpoint-<n>/    files first, the completion marker last

Only checkpoints with a completion marker are uploaded. A step resumes from the newest one that verifies, of any
attempt. One that does not verify is skipped, and the reason is logged.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

from qlora_retrain.core import signals
from qlora_retrain.core.errors import Problem
from qlora_retrain.core.progress import say
from qlora_retrain.lm import checkpoints
from qlora_retrain.storage.store import NotFound, Store

# Two, so that one damaged checkpoint does not cost all the work.
_NUM_CHECKPOINTS = 2
_POLL_SECONDS = 2.0


def restore(store: Store, prefix: str, folder: Path) -> int | None:
    """Fetch the newest valid checkpoint below `prefix` into `folder`; return its optimizer step, or None."""
    for step, path in _complete_checkpoints(store, prefix):
        local = folder / f"checkpoint-{step}"
        # Verified by its hashes, because training must not resume from a truncated checkpoint.
        fault = _fetch(store, path, local)
        if fault is None:
            say(f"resuming from {path}")
            return step
        say(f"skipped {path}: {fault}")
        shutil.rmtree(local, ignore_errors=True)
    return None


def remove(store: Store, prefix: str) -> None:
    """Delete every attempt's checkpoints."""
    store.delete([e.path for e in store.list(prefix)])


class CheckpointUploader:
    """Uploads newly completed checkpoints from a thread of its own, and once more at the end.

    Args:
        store: The store to upload to.
        prefix: The store's folder with the checkpoints of every attempt.
        attempt: The id of this attempt.
        folder: The local folder in which the step writes its checkpoints.
    """

    def __init__(self, store: Store, prefix: str, attempt: str, folder: Path) -> None:
        self._store, self._prefix, self._folder = store, prefix, folder
        self._attempt_prefix = f"{prefix}/{attempt}"
        # Optimizer steps whose checkpoint is in the store, oldest first.
        self._uploaded: list[int] = []
        # `sync` is called by the thread, and by `stop` after it.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="checkpoint-uploader", daemon=True)

    def start(self, restored_step: int | None) -> None:
        """Start the thread; the checkpoint of `restored_step` is in the store already."""
        if restored_step is not None:
            self._uploaded.append(restored_step)
        self._thread.start()

    def stop(self, *, sync: bool) -> None:
        """Stop the thread.

        Args:
            sync: Upload what is complete and not in the store yet. An error of that upload is logged and not raised.
        """
        self._stop.set()
        self._thread.join()
        if sync:
            self._try_sync(is_last=True)

    def sync(self) -> None:
        """Upload every complete checkpoint that is not in the store, oldest first; delete all but the newest two."""
        with self._lock:
            for local in sorted(self._folder.glob("checkpoint-*"), key=_step_of):
                step = _step_of(local)
                if step in self._uploaded or not (local / checkpoints.MARKER).is_file():
                    continue

                target = f"{self._attempt_prefix}/checkpoint-{step}"
                try:
                    marker = json.loads((local / checkpoints.MARKER).read_text())
                    self._store.upload(local, target, [f["path"] for f in marker["files"]])
                    # The marker last, because a checkpoint without it counts as incomplete.
                    self._store.upload(local, target, [checkpoints.MARKER])
                except FileNotFoundError:
                    continue  # the trainer has deleted it meanwhile; a newer one follows

                self._uploaded.append(step)
                del self._uploaded[:-_NUM_CHECKPOINTS]
                self._delete_older_than(self._uploaded[0])

    def _delete_older_than(self, oldest_step: int) -> None:
        """Delete the checkpoints below a step; the marker goes first, so that no half-deleted one looks complete."""
        for step, path in _complete_checkpoints(self._store, self._prefix):
            if step < oldest_step:
                self._store.delete([f"{path}/{checkpoints.MARKER}"])
                self._store.delete([e.path for e in self._store.list(path)])

    def _loop(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._try_sync()

    def _try_sync(self, *, is_last: bool = False) -> None:
        try:
            self.sync()
            if is_last and (complete := _complete_checkpoints(self._store, self._prefix)):
                say(f"the newest checkpoint is {self._store.uri}/{complete[0][1]}")
        except signals.StoppedBySignal:
            raise
        except (Problem, OSError) as error:
            say(f"checkpoint not uploaded: {error}")


def _complete_checkpoints(store: Store, prefix: str) -> list[tuple[int, str]]:
    """Return (optimizer step, path) of every complete checkpoint, newest first."""
    complete = []
    for entry in store.list(prefix):
        match = re.fullmatch(r"(.*/checkpoint-(\d+))/" + re.escape(checkpoints.MARKER), entry.path)
        if match:
            complete.append((int(match[2]), match[1]))
    return sorted(complete, reverse=True)


def _fetch(store: Store, path: str, local: Path) -> str | None:
    """Download a checkpoint and verify it; return what is wrong with it, or None."""
    try:
        marker = store.read(f"{path}/{checkpoints.MARKER}").data
        names = [f["path"] for f in json.loads(marker)["files"]]
        store.download(path, [*names, checkpoints.MARKER], local)
    except (NotFound, ValueError, KeyError, TypeError) as error:
        return f"cannot be fetched: {error!r}"
    return checkpoints.invalid_reason(local)


def _step_of(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1
