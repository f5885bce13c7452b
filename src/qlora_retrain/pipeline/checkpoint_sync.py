"""Checkpoints that outlive their process: restored before a step with scratch runs, mirrored while it does.

    scratch/<step>/<key>/<attempt>/checkpoint-<n>/    files first, the completion marker last

Only checkpoints with a completion marker travel. The newest one that verifies, of any attempt, is where work goes on;
one that does not is passed over with the reason.
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

_KEPT = 2
_LOOK_EVERY_SECONDS = 2.0


def restore(store: Store, prefix: str, folder: Path) -> int | None:
    """Fetch the newest valid checkpoint below `prefix` into `folder`; returns its step, or None."""
    for step, path in _candidates(store, prefix):
        local = folder / f"checkpoint-{step}"
        fault = _fetch(store, path, local)
        if fault is None:
            say(f"going on from {path}")
            return step
        say(f"passed over {path}: {fault}")
        shutil.rmtree(local, ignore_errors=True)
    return None


def remove(store: Store, prefix: str) -> None:
    """Delete every attempt's checkpoints."""
    store.delete([e.path for e in store.list(prefix)])


class Mirror:
    """Copies newly completed checkpoints to the store from a thread of its own, and once more at the end.

    Args:
        store: Where to.
        prefix: Below which every attempt has its checkpoints.
        attempt: This one.
        folder: Where the step writes them.
    """

    def __init__(self, store: Store, prefix: str, attempt: str, folder: Path) -> None:
        self._store, self._of_all, self._prefix, self._folder = store, prefix, f"{prefix}/{attempt}", folder
        self._sent: list[int] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="checkpoint-mirror", daemon=True)

    def start(self, restored: int | None) -> None:
        """Begin; the checkpoint that was just restored is in the store already."""
        if restored is not None:
            self._sent.append(restored)
        self._thread.start()

    def stop(self, *, sync: bool) -> None:
        """Stop the thread; `sync` sends first what is complete but not there, and never hides how the step ended."""
        self._stop.set()
        self._thread.join()
        if sync:
            self._try_sync(last=True)

    def sync(self) -> None:
        """Send every complete checkpoint that was not sent, oldest first; keep the last few, of whatever attempt."""
        with self._lock:
            for local in sorted(self._folder.glob("checkpoint-*"), key=_number):
                step = _number(local)
                if step in self._sent or not (local / checkpoints.MARKER).is_file():
                    continue
                target = f"{self._prefix}/checkpoint-{step}"
                try:
                    marker = json.loads((local / checkpoints.MARKER).read_text())
                    self._store.upload(local, target, [f["path"] for f in marker["files"]])
                    self._store.upload(local, target, [checkpoints.MARKER])
                except FileNotFoundError:
                    continue  # the trainer rotated it away meanwhile; a newer one follows
                self._sent.append(step)
                del self._sent[:-_KEPT]
                for step, path in _candidates(self._store, self._of_all):
                    if step < self._sent[0]:
                        self._store.delete([f"{path}/{checkpoints.MARKER}"])
                        self._store.delete([e.path for e in self._store.list(path)])

    def _loop(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_SECONDS):
            self._try_sync()

    def _try_sync(self, *, last: bool = False) -> None:
        try:
            self.sync()
            if last and (kept := _candidates(self._store, self._of_all)):
                say(f"the newest checkpoint is {self._store.uri}/{kept[0][1]}")
        except signals.Stopped:
            raise
        except (Problem, OSError) as error:
            say(f"checkpoint not mirrored: {error}")


def _candidates(store: Store, prefix: str) -> list[tuple[int, str]]:
    """(step, path) of every complete checkpoint, newest first."""
    found = []
    for entry in store.list(prefix):
        match = re.fullmatch(r"(.*/checkpoint-(\d+))/" + re.escape(checkpoints.MARKER), entry.path)
        if match:
            found.append((int(match[2]), match[1]))
    return sorted(found, reverse=True)


def _fetch(store: Store, path: str, local: Path) -> str | None:
    try:
        marker = store.read(f"{path}/{checkpoints.MARKER}").data
        names = [f["path"] for f in json.loads(marker)["files"]]
        store.download(path, [*names, checkpoints.MARKER], local)
    except (NotFound, ValueError, KeyError, TypeError) as error:
        return f"cannot be fetched: {error!r}"
    return checkpoints.verify(local)


def _number(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1
