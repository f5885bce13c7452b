"""The store in a folder of this machine, or of a file system that several machines mount.

A file becomes visible in one step: it is filled under a hidden temporary name beside its place, flushed to the disk,
then renamed, or hard-linked where nothing may be there yet. A process killed at any moment leaves at most a hidden
file. `swap` compares and replaces under one lock file in the root (`flock`, which separates threads too).
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

from qlora_retrain.core import uris
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.storage import files
from qlora_retrain.storage.store import RESERVED, Conflict, Entry, Exists, NotFound, Stored, checked, joined, probe

WORKERS = 8  # copies at once: one stream does not fill a network disk


class LocalStore:
    """A store in a folder, which the first write creates."""

    def __init__(self, uri: str) -> None:
        self.uri = uris.absolute(uri)
        self._root = uris.local_path(self.uri)

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def read(self, path: str) -> Stored:
        """The document; its tag is the sha256 of its bytes."""
        with files.disk_errors(self._root):
            try:
                data = self._found(path).read_bytes()
            except FileNotFoundError:  # removed since it was found
                raise NotFound(f"{self.uri}/{path}") from None
        return Stored(data, _tag(data))

    def write_if_absent(self, path: str, data: bytes) -> str:
        """Hard-link a finished temporary file to its name, which fails if the name is taken."""
        target = self._root / checked(path)
        for _ in range(files.TRIES):
            with contextlib.suppress(FileExistsError):
                files.place(target, lambda temporary: temporary.write_bytes(data), files.link)
                return _tag(data)
            with contextlib.suppress(NotFound):  # what was there is removed by now: write again
                found = self.read(path)
                if found.data != data:
                    raise Exists(f"{self.uri}/{path}", found)
                return found.tag
        raise TryAgain(f"{self.uri}/{path}: others write and remove it again and again")

    def swap(self, path: str, data: bytes, expected: str | None) -> str:
        """Compare and rename while holding the lock."""
        try:
            if expected is None:
                return self.write_if_absent(path, data)
            with self._lock():
                found = self.read(path)
                if found.data != data:
                    if found.tag != expected:
                        raise Conflict(f"{self.uri}/{path}")
                    files.place(self._root / path, lambda temporary: temporary.write_bytes(data), files.replace)
                return _tag(data)
        except (Exists, NotFound) as error:
            raise Conflict(str(error)) from None

    def list(self, prefix: str) -> Iterator[Entry]:
        """Walk the folder."""
        entries = []
        with files.disk_errors(self._root):
            for file in files.files(self._folder(prefix)):
                with contextlib.suppress(FileNotFoundError):  # removed since it was seen
                    path = Path(file.path).relative_to(self._root).as_posix()
                    entries.append(Entry(path, file.stat().st_size))
        return iter(sorted(entries, key=lambda entry: entry.path))

    def children(self, prefix: str) -> Iterator[str]:
        """Look into the folder, and into its folders as far as their first file."""
        with files.disk_errors(self._root):
            found = files.entries(self._folder(prefix))
            return iter(sorted(e.name for e in found if not e.is_dir() or any(True for _ in files.files(e.path))))

    def upload(self, folder: Path, prefix: str, paths: Iterable[str]) -> None:
        """Copy, flush, rename."""

        def one(path: str) -> None:
            target = self._root / joined(prefix, path)
            files.place(target, lambda temporary: shutil.copyfile(folder / path, temporary), files.replace)

        _parallel(one, paths)

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Copy, rename. Never a link: what a step does to its input must not reach the store."""

        def one(path: str) -> None:
            source = joined(prefix, path)
            files.place(folder / path, lambda temporary: shutil.copyfile(self._found(source), temporary), os.replace)

        _parallel(one, paths)

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Hard-link, or copy where that cannot be: no file of a store is ever written in place."""

        def one(pair: tuple[str, str]) -> None:
            source, target = pair
            files.place(
                self._root / checked(target),
                lambda temporary: files.link_or_copy(self._found(source), temporary),
                files.replace,
            )

        _parallel(one, pairs)

    def delete(self, paths: Iterable[str]) -> None:
        """Remove the files, and the folders that this empties."""
        targets = [self._root / checked(path) for path in paths]
        if not self._root.is_dir():
            return
        with files.disk_errors(self._root), self._lock():  # the lock: a `swap` must not bring back what is removed
            for target in targets:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    target.unlink()
            for folder in sorted({t.parent for t in targets}, reverse=True):
                files.prune(folder, self._root)

    def probe(self) -> None:
        """Try links, renames and the lock for real: some network file systems lack one of them."""
        probe(self)

    def _found(self, path: str) -> Path:
        with files.disk_errors(self._root):
            if not (self._root / checked(path)).is_file():
                raise NotFound(f"{self.uri}/{path}")
        return self._root / path

    def _folder(self, prefix: str) -> Path:
        return self._root / checked(prefix) if prefix else self._root

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with files.disk_errors(self._root):
            files.make_folder(self._root)
            handle = os.open(self._root / f"{RESERVED}lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # which unlocks


def _parallel(one: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(one, items):  # the first error cancels what has not begun
            pass


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
