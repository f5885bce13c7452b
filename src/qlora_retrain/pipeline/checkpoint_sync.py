"""Checkpoints that outlive their process: restored before a step with scratch runs, uploaded while it does.

    scratch/<step>/<key>/<attempt>/checkpoint-<n>/    files first, the completion marker last

Only checkpoints with a completion marker are uploaded. A step resumes from the newest one that verifies, of any
attempt, and that it can load. Every other one is skipped, and the reason is logged: what lies in scratch decides how
much is trained again, and never that a step cannot run. Only a store that is away or busy ends the attempt (75).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_retrain.core import hashing, signals
from qlora_retrain.core.errors import IntegrityError, Problem, TryAgain
from qlora_retrain.core.progress import say
from qlora_retrain.lm import checkpoints
from qlora_retrain.lm.checkpoints import InvalidCheckpoint, Marker
from qlora_retrain.storage import atomic_files, signatures
from qlora_retrain.storage.store import NotFound, Store, is_valid_path

# Two, so that one damaged checkpoint does not cost all the work.
_NUM_CHECKPOINTS = 2
# Only the newest so many are looked at. Attempts that work side by side leave two each.
_MAX_CANDIDATES = 50
_POLL_SECONDS = 2.0
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*/checkpoint-([0-9]{1,9})")


@dataclass(frozen=True, slots=True, order=True)
class StoredCheckpoint:
    """A checkpoint in the store that has a marker; it may still be damaged, or not ours.

    Attributes:
        step: The optimizer step in its name.
        path: Its folder in the store.
    """

    step: int
    path: str


def restore(store: Store, prefix: str, folder: Path) -> int | None:
    """Fetch the valid checkpoints below `prefix` into `folder`; return the newest one's optimizer step, or None.

    The older ones are fetched too, for the case that the step cannot load the newest.

    Raises:
        TryAgain: If the store is away or busy, or the disk is full.
    """
    try:
        sizes = _list_sizes(store, prefix)
    except TryAgain:
        raise
    except (Problem, OSError) as error:
        say(f"skipped every checkpoint below {store.uri}/{prefix}: they cannot be listed: {error}")
        return None

    newest: int | None = None
    candidates = _complete_checkpoints(prefix, sizes)[:_MAX_CANDIDATES]
    for stored in candidates:
        local = folder / f"checkpoint-{stored.step}"
        # Attempts that ran side by side may have saved the same step, and one of them is enough.
        if local.exists():
            continue
        # Verified by its hashes, because training must not resume from a truncated checkpoint.
        if reason := _fetch(store, stored, sizes, local) or checkpoints.invalid_reason(local):
            say(f"skipped {stored.path}: {reason}")
            shutil.rmtree(local, ignore_errors=True)
        elif newest is None:
            newest = stored.step
            say(f"resuming from {stored.path}")

    num_ignored = sum(path.endswith(f"/{checkpoints.MARKER}") for path in sizes) - len(candidates)
    if num_ignored:
        say(
            f"skipped {num_ignored} more below {prefix}: only the newest {_MAX_CANDIDATES} are looked at, and only "
            "those with a name that a step gives"
        )
    return newest


def remove(store: Store, prefix: str) -> None:
    """Delete every attempt's checkpoints. The step is done by now, so an error is logged and not raised."""
    try:
        _delete_below(store, prefix)
    except signals.StoppedBySignal:
        raise
    except (Problem, OSError) as error:
        say(f"checkpoints not removed: {error}")


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
        # The markers of the local checkpoints that are in the store, by their optimizer step. A step that is computed
        # again, because its checkpoint could not be loaded, has another marker.
        self._uploaded: dict[int, bytes] = {}
        # `sync` is called by the thread, and by `stop` after it.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="checkpoint-uploader", daemon=True)

    def start(self) -> None:
        """Start the thread; the checkpoints that are in the folder now are in the store already."""
        self._uploaded = self._local_markers()
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
            markers = self._local_markers()
            for step, data in markers.items():
                if self._uploaded.get(step) == data:
                    continue

                local, target = self._folder / f"checkpoint-{step}", f"{self._attempt_prefix}/checkpoint-{step}"
                try:
                    self._store.upload(local, target, checkpoints.parse_marker(data, step).files)
                    # The marker last, because a checkpoint without it counts as incomplete.
                    _upload_marker(self._store, f"{target}/{checkpoints.MARKER}", data)
                except (FileNotFoundError, InvalidCheckpoint):
                    continue  # the trainer has deleted it meanwhile, or did not write it; a newer one follows

                self._uploaded[step] = data
                # One that the trainer could not load is no longer here, and does not count.
                newest = sorted(self._uploaded.keys() & markers.keys())[-_NUM_CHECKPOINTS:]
                self._delete_older_than(newest[0])

    def _local_markers(self) -> dict[int, bytes]:
        """Return the markers of the complete checkpoints in the local folder, oldest first."""
        markers = {}
        for folder in checkpoints.sorted_checkpoints(self._folder):
            try:
                markers[checkpoints.step_of(folder)] = (folder / checkpoints.MARKER).read_bytes()
            except FileNotFoundError:
                continue  # not complete yet, or being deleted
        return markers

    def _delete_older_than(self, oldest_step: int) -> None:
        """Delete the checkpoints below a step; the marker goes first, so that no half-deleted one looks complete."""
        for stored in _complete_checkpoints(self._prefix, _list_sizes(self._store, self._prefix)):
            if stored.step < oldest_step:
                self._store.delete([f"{stored.path}/{checkpoints.MARKER}"])
                _delete_below(self._store, stored.path)

    def _loop(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._try_sync()

    def _try_sync(self, *, is_last: bool = False) -> None:
        try:
            self.sync()
            if is_last and (complete := _complete_checkpoints(self._prefix, _list_sizes(self._store, self._prefix))):
                say(f"the newest checkpoint is {self._store.uri}/{complete[0].path}")
        except signals.StoppedBySignal:
            raise
        except (Problem, OSError) as error:
            say(f"checkpoint not uploaded: {error}")


def _list_sizes(store: Store, prefix: str) -> dict[str, int]:
    """Return the size of every file below a folder, by its path in the store."""
    return {entry.path: entry.size_bytes for entry in store.list(prefix)}


def _complete_checkpoints(prefix: str, sizes: Mapping[str, int]) -> list[StoredCheckpoint]:
    """Return the checkpoints that have a marker, newest first; `sizes` has every file below the prefix."""
    complete = []
    for path in sizes:
        folder, _, name = path.rpartition("/")
        match = _PATH.fullmatch(folder.removeprefix(f"{prefix}/"))
        if match and name == checkpoints.MARKER:
            complete.append(StoredCheckpoint(int(match[1]), folder))
    return sorted(complete, reverse=True)


def _fetch(store: Store, stored: StoredCheckpoint, sizes: Mapping[str, int], local: Path) -> str | None:
    """Download a checkpoint; return why it cannot be fetched, or None.

    Nothing is downloaded before its marker and the listed sizes agree, and the disk has room for it.
    """
    try:
        data = store.read_start(f"{stored.path}/{checkpoints.MARKER}", checkpoints.MAX_MARKER_BYTES + 1)
        marker = _read_marker(store, stored, data)
        for path, file in marker.files.items():
            size = sizes.get(f"{stored.path}/{path}")
            if size != file.size_bytes:
                return f"{path} is missing" if size is None else f"{path} has {size} bytes, not {file.size_bytes}"
        free_bytes = atomic_files.free_bytes(local.parent)
        if free_bytes is not None and marker.size_bytes > free_bytes:
            return f"its files have {marker.size_bytes} bytes, and the disk has room for {free_bytes}"

        store.download(stored.path, marker.files, local)
        # The very bytes that were checked, because the store's may have changed meanwhile.
        (local / checkpoints.MARKER).write_bytes(data)
    except TryAgain:
        raise
    except InvalidCheckpoint as error:
        return str(error)
    except NotFound as error:
        return f"cannot be fetched: {error} is missing"
    except (Problem, OSError) as error:
        return f"cannot be fetched: {error}"
    return None


def _upload_marker(store: Store, path: str, data: bytes) -> None:
    """Write a checkpoint's marker, signed for its path by the step's role where the store has keys."""
    fields = signatures.parse_fields(data)
    signature = signatures.sign_fields(store, path, fields, _role(path))
    if signature is not None:
        data = json.dumps({**fields, "signature": signature.model_dump()}, indent=1).encode()
    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / name).write_bytes(data)
        store.upload(Path(temporary), folder, [name])


def _read_marker(store: Store, stored: StoredCheckpoint, data: bytes) -> Marker:
    """Return the marker of a checkpoint in the store.

    Raises:
        InvalidCheckpoint: If it cannot be read, or the step's role did not sign it for this place.
    """
    marker = checkpoints.parse_marker(data, stored.step)
    path = f"{stored.path}/{checkpoints.MARKER}"
    try:
        signer = signatures.signer_of(path, signatures.parse_fields(data))
        signatures.check(store, path, signer, _role(path), hashing.sha256_bytes(data))
    except (IntegrityError, ValueError) as error:
        raise InvalidCheckpoint(str(error)) from error
    return marker


def _role(path: str) -> str:
    """Return the role that signs a checkpoint: its step's name, which follows `scratch/`."""
    return path.split("/")[1]


def _delete_below(store: Store, prefix: str) -> None:
    """Delete the files below a folder, except those whose names no store could have given them."""
    store.delete([entry.path for entry in store.list(prefix) if is_valid_path(entry.path)])
