"""Download files in ranges that travel in parallel; each byte is hashed once, in the pass that writes it.

The ranges of all files form one queue, and at most `NUM_RANGES` of them are under way. They are written in their order,
so the memory in use does not depend on the size of a file, and a file that is cut off is the beginning of what it will
be. The next download reads that beginning and goes on behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import Cause, IntegrityError, TryAgain
from qlora_retrain.storage import atomic_files
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import NotFound, Store

# 16 ranges of 8 MiB: 128 MiB of memory. Smaller ranges wait longer for the server than they travel.
RANGE_BYTES = 8 * 2**20
NUM_RANGES = 16
_REPAIR_HINT = "whoever may write to the store mends it with: qlora-retrain models repair LINE VERSION"


def _progress_bar(files: Sequence[File]) -> Any:
    """Return a bar for a person at a terminal; anywhere else one that shows nothing."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    # A bar is for people alone, so nobody else waits for the import, and a light image need not have it.
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return contextlib.nullcontext()

    total_bytes = sum(file.size_bytes for file in files)
    return tqdm(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="download", file=sys.stderr)


def download(store: Store, prefix: str, files: Sequence[File], folder: Path) -> None:
    """Bring files of the store into a folder, each with the hash that is promised for it.

    What the folder has of them already is read and used. A file that turns out to have other bytes is removed.

    Args:
        store: The store.
        prefix: The store's folder of the files.
        files: The files, with valid relative paths.
        folder: A folder that nobody else writes to, without links.

    Raises:
        IntegrityError: If a file is missing in the store or has other bytes there.
        TryAgain: If the disk has too little room, or the store is busy.
    """
    with atomic_files.disk_errors(folder), _progress_bar(files) as bar:
        _refuse_full_disk(files, folder)
        pools = _Pools(ThreadPoolExecutor(NUM_RANGES), ThreadPoolExecutor(1))
        try:
            wrong = _transfer(store, prefix, files, folder, pools, bar)
            # The beginning that lay there may be the fault: those files come once more, from their first byte.
            wrong = [target for target in wrong if not target.is_resumed] or _transfer(
                store, prefix, [target.file for target in wrong], folder, pools, bar
            )
        finally:
            # Without waiting: after an interruption, what is still under way is only read.
            pools.readers.shutdown(wait=False, cancel_futures=True)
            pools.writer.shutdown()
    if wrong:
        file = wrong[0].file
        raise IntegrityError(
            f"{store.uri}/{prefix}/{file.path}: is not what was published: expected sha256 {file.sha256[:12]}, found "
            f"{wrong[0].sha256[:12]}; {_REPAIR_HINT}"
        )


@dataclass(frozen=True, slots=True)
class _Pools:
    """The threads that read ranges, and the one that writes a range while it is hashed."""

    readers: ThreadPoolExecutor
    writer: ThreadPoolExecutor


class _Target:
    """A file that is being written, and the hash of what it has so far."""

    def __init__(self, file: File, folder: Path) -> None:
        self.file = file
        self.path = folder / file.path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._hasher = hashlib.sha256()
        self.start_bytes = self._read_beginning()
        self.is_resumed = self.start_bytes > 0

    def _read_beginning(self) -> int:
        """Hash what is there; return its size. What cannot be the file or its beginning is removed."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self.path.touch()
            return 0
        # Nothing is added to a file that has a second name: that name is another version's.
        is_other_file = status.st_size < self.file.size_bytes and status.st_nlink > 1
        if status.st_size <= self.file.size_bytes and not is_other_file:
            with self.path.open("rb") as stream:
                self._hasher = hashing.hasher_of(stream)
            if status.st_size < self.file.size_bytes or self.is_right:
                return status.st_size
            self._hasher = hashlib.sha256()
        self.path.unlink()
        self.path.touch()
        return 0

    @property
    def sha256(self) -> str:
        """The hash of the bytes so far."""
        return self._hasher.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether the bytes so far are those of the whole file."""
        return self.sha256 == self.file.sha256

    def append(self, data: bytes, writer: ThreadPoolExecutor) -> None:
        # Both take about as long, and neither needs Python's global lock.
        writing = writer.submit(self._write, data)
        self._hasher.update(data)
        writing.result()

    def _write(self, data: bytes) -> None:
        with self.path.open("ab") as stream:
            stream.write(data)


def _transfer(store: Store, prefix: str, files: Iterable[File], folder: Path, pools: _Pools, bar: Any) -> list[_Target]:
    """Download files and show it on a bar, if there is one; return those with other bytes, which are removed."""
    wrong: list[_Target] = []
    under_way: deque[tuple[_Target, Future[bytes], bool]] = deque()

    def write_next() -> None:
        target, data, is_last = under_way.popleft()
        try:
            target.append(data.result(), pools.writer)
        except NotFound as error:
            raise IntegrityError(f"{store.uri}/{prefix}/{target.file.path}: missing; {_REPAIR_HINT}") from error
        if bar is not None:
            bar.update(len(data.result()))
        if is_last and not target.is_right:
            target.path.unlink()
            wrong.append(target)

    for target in (_Target(file, folder) for file in files):
        path, size_bytes = f"{prefix}/{target.file.path}", target.file.size_bytes
        if bar is not None:
            bar.update(target.start_bytes)
        for start in range(target.start_bytes, size_bytes, RANGE_BYTES):
            if len(under_way) == NUM_RANGES:
                write_next()
            num_bytes = min(RANGE_BYTES, size_bytes - start)
            data = pools.readers.submit(store.read_range, path, start, num_bytes)
            under_way.append((target, data, start + num_bytes == size_bytes))
        if size_bytes == 0 and not target.is_right:
            target.path.unlink()
            wrong.append(target)
    while under_way:
        write_next()
    return wrong


def _refuse_full_disk(files: Iterable[File], folder: Path) -> None:
    """Refuse to begin what cannot end; a disk that is full harms everybody on this machine."""
    num_bytes = 0
    for file in files:
        path = folder / file.path
        num_bytes += file.size_bytes - (path.stat().st_size if path.exists() else 0)
    free_bytes = atomic_files.free_bytes(folder)
    if free_bytes is not None and num_bytes > free_bytes:
        raise TryAgain(
            f"{folder}: expected room for {num_bytes / 2**20:,.1f} MiB more, found {free_bytes / 2**20:,.1f} MiB; make "
            "room, then run the same command again",
            cause=Cause.DISK_FULL,
        )
