"""The store in a folder of this machine, or of a file system that several machines mount.

A file becomes visible in one step. It is filled under a hidden temporary name beside its place and flushed to the disk.
Then it is renamed, or hard-linked where no file may be there yet. A process that is killed at any moment leaves at most
a hidden file. `swap` compares and replaces under one lock file in the root (`flock`, which separates threads too).
Files are 0644 and folders 0755 whatever the umask: the containers that read them may run as another user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_retrain.core import hashing, uris
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage import atomic_files
from qlora_retrain.storage.store import (
    RESERVED_PREFIX,
    AlreadyExists,
    Conflict,
    Document,
    Entry,
    NotFound,
    is_valid_path,
    join_path,
    probe,
    read_bounded,
    validate_path,
)

# Whoever deletes or swaps locks this file in the root, so it must be writable even where little else is.
LOCK_FILE = f"{RESERVED_PREFIX}lock"
# Copies at once: one stream does not use the whole bandwidth of a network disk.
NUM_WORKERS = 8


class LocalStore:
    """A store in a folder; the first write creates the folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uris.absolute(uri)
        self._root = uris.local_path(self.uri)

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def read(self, path: str) -> Document:
        """Return the document; its tag is the sha256 of its bytes."""
        with atomic_files.disk_errors(self._root):
            try:
                with self._existing(path).open("rb") as file:
                    data = read_bounded(file, f"{self.uri}/{path}")
            except FileNotFoundError:  # removed after the check
                raise NotFound(f"{self.uri}/{path}") from None
        return Document(data, _tag(data))

    def read_start(self, path: str, size_bytes: int) -> bytes:
        """Read the beginning of the file."""
        return self.read_range(path, 0, size_bytes)

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        """Read a part of the file."""
        with atomic_files.disk_errors(self._root):
            try:
                with self._existing(path).open("rb") as file:
                    file.seek(start)
                    return file.read(size_bytes)
            except FileNotFoundError:  # removed after the check
                raise NotFound(f"{self.uri}/{path}") from None

    def sha256(self, path: str) -> str:
        """Hash the file."""
        with atomic_files.disk_errors(self._root):
            try:
                return hashing.sha256_file(self._existing(path))
            except FileNotFoundError:  # removed after the check
                raise NotFound(f"{self.uri}/{path}") from None

    def write_if_absent(self, path: str, data: bytes) -> str:
        """Hard-link a finished temporary file to its name, which fails if the name is taken."""
        # Not a rename, which would replace what is there.
        target = self._changeable(path)

        for _ in range(atomic_files.MAX_ATTEMPTS):
            with contextlib.suppress(FileExistsError):
                atomic_files.write_atomically(
                    target, lambda temporary: temporary.write_bytes(data), atomic_files.publish_by_link
                )
                return _tag(data)

            # If the document that was in the way is removed by now, the next round writes again.
            with contextlib.suppress(NotFound):
                stored = self.read(path)
                if stored.data != data:
                    raise AlreadyExists(f"{self.uri}/{path}", stored)
                return stored.tag
        raise TryAgain(
            f"{self.uri}/{path}: other processes write and remove it again and again; run the same command again",
            cause=Cause.CONFLICT,
        )

    def swap(self, path: str, data: bytes, expected: str | None) -> str:
        """Compare and rename while holding the lock."""
        try:
            if expected is None:
                return self.write_if_absent(path, data)
            # Other swaps wait at the lock. Readers never do: for them the rename is one step.
            with self._lock():
                stored = self.read(path)
                if stored.data != data:
                    if stored.tag != expected:
                        raise Conflict(f"{self.uri}/{path}")
                    atomic_files.write_atomically(
                        self._changeable(path),
                        lambda temporary: temporary.write_bytes(data),
                        atomic_files.publish_by_rename,
                    )
                return _tag(data)
        except (AlreadyExists, NotFound) as error:
            raise Conflict(str(error)) from None

    def list(self, prefix: str) -> Iterator[Entry]:
        """Walk the folder."""
        entries = []
        with atomic_files.disk_errors(self._root):
            for file in atomic_files.walk_files(self._folder(prefix)):
                with contextlib.suppress(FileNotFoundError):  # removed while this walks
                    path = Path(file.path).relative_to(self._root).as_posix()
                    status = file.stat()
                    entries.append(Entry(path, status.st_size, modified_at=status.st_mtime))
        return iter(sorted(entries, key=lambda entry: entry.path))

    def children(self, prefix: str) -> Iterator[str]:
        """Look into the folder, and into each of its folders as far as the first file: an empty one does not count."""
        with atomic_files.disk_errors(self._root):
            entries = atomic_files.visible_entries(self._folder(prefix))
            names = (
                e.name
                for e in entries
                if is_valid_path(e.name) and (not e.is_dir() or any(True for _ in atomic_files.walk_files(e.path)))
            )
            return iter(sorted(names))

    def upload(self, folder: Path, prefix: str, paths: Iterable[str]) -> None:
        """Copy, flush, rename."""

        def upload_file(path: str) -> None:
            target = self._changeable(join_path(prefix, path))
            atomic_files.write_atomically(
                target, lambda temporary: shutil.copyfile(folder / path, temporary), atomic_files.publish_by_rename
            )

        _run_parallel(upload_file, paths)

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Copy, rename. Never a link: what a step does to its input must not reach the store."""

        def download_file(path: str) -> None:
            source = join_path(prefix, path)
            atomic_files.write_atomically(
                folder / path, lambda temporary: shutil.copyfile(self._existing(source), temporary), os.replace
            )

        _run_parallel(download_file, paths)

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Hard-link, or copy where there are no links. A link is safe, since no file of a store is written in place."""

        def copy_file(pair: tuple[str, str]) -> None:
            source, target = pair
            atomic_files.write_atomically(
                self._changeable(target),
                lambda temporary: atomic_files.link_or_copy(self._existing(source), temporary),
                atomic_files.publish_by_rename,
            )

        _run_parallel(copy_file, pairs)

    def delete(self, paths: Iterable[str]) -> None:
        """Remove the files, and the folders that this empties."""
        targets = [self._changeable(path) for path in paths]
        if not self._root.is_dir():
            return

        # Under the lock, because a `swap` could bring back a document that is removed at the same time.
        with atomic_files.disk_errors(self._root), self._lock():
            for target in targets:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    target.unlink()
            # The deepest folders first, so that their parents are empty when it is their turn.
            for folder in sorted({t.parent for t in targets}, reverse=True):
                atomic_files.remove_empty_folders(folder, self._root)

    def probe(self) -> None:
        """Try links, renames and the lock: some network file systems lack one of them."""
        probe(self)

    def _existing(self, path: str) -> Path:
        """Return the path of a file that exists; raise `NotFound` for anything else, a link too."""
        with atomic_files.disk_errors(self._root):
            file = self._root / validate_path(path)
            if not file.is_file() or file.is_symlink():
                raise NotFound(f"{self.uri}/{path}")
        return file

    def _changeable(self, path: str) -> Path:
        """Return the path of a file that is written or removed.

        Raises:
            UsageError: If a folder above it is a link. Whoever may write to a part of the store could have put it
                there, and another process would write or remove where it leads to.
        """
        file = self._root / validate_path(path)
        # The store, and the folders in it, may be on other disks; no step may write there.
        for folder in list(file.parents)[: len(Path(path).parts) - 2]:
            if folder.is_symlink():
                raise UsageError(
                    f"{folder}: is a link; no folder of a store is one, so somebody put it there: remove it"
                )
        return file

    def _folder(self, prefix: str) -> Path:
        return self._root / validate_path(prefix) if prefix else self._root

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the store's one lock; the kernel releases it when a process dies."""
        with atomic_files.disk_errors(self._root):
            atomic_files.make_folder(self._root)
            handle = os.open(self._root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # which releases the lock


def _run_parallel(function: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call the function for each item, several at once."""
    # Threads and not processes: Python releases its global lock while it copies.
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        # Reading the results raises the first error, which cancels the calls that have not begun.
        for _ in pool.map(function, items):
            pass


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
