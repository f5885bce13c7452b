"""A source in a folder of this machine. Nothing in it is trusted: its links lead only to where sources may lie."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from qlora_retrain.core import hashing, local_files
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.storage import atomic_files, globs
from qlora_retrain.storage.store import Document, NotFound, join_path, read_bounded, validate_path

_NUM_WORKERS = 8
_BLOCK_BYTES = 512  # of `st_blocks`, on every system
# A file system that compresses saves less.
_MIN_SPARSE_BYTES, _MAX_SPARSENESS = 1 << 30, 64


class SourceFolder:
    """The files of a folder, for reading.

    Args:
        path: The folder.
        access: Where its links may lead to.
    """

    def __init__(self, path: Path, access: SourceAccess) -> None:
        self._path, self._access = path, access

    def paths(self, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the relative paths of the files that the globs take, and of all others; see `local_files`."""
        return local_files.list_files(
            self._path,
            self._access,
            lambda name: globs.matches_any(name, patterns),
            lambda name: globs.may_match_below(name, patterns),
        )

    def read(self, path: str) -> Document:
        """Return a small file."""
        with self._open(path) as file:
            data = read_bounded(file, str(self._path / path))
        return Document(data, hashing.sha256_bytes(data))

    def read_start(self, path: str, size_bytes: int) -> bytes:
        """Return the beginning of a file."""
        with self._open(path) as file:
            return file.read(size_bytes)

    def size_and_sha256(self, path: str) -> tuple[int, str]:
        """Return the size of a file in bytes, and its sha256."""
        with self._open(path) as file:
            status = os.fstat(file.fileno())
            size_bytes, disk_bytes = status.st_size, status.st_blocks * _BLOCK_BYTES
            # Any number of terabytes takes no place on a disk, and hours to hash and to copy.
            if size_bytes > max(_MIN_SPARSE_BYTES, disk_bytes * _MAX_SPARSENESS):
                raise UsageError(
                    f"{self._path / path}: expected a file with its bytes on the disk, found {size_bytes:,} bytes of "
                    f"which the disk has {disk_bytes:,}: it is nearly all holes; leave it out with `files`"
                )
            return size_bytes, hashing.sha256_stream(file)

    def size_and_times(self, path: str) -> tuple[int, str]:
        """Return the size of a file in bytes, and a text that is another one when it was written or replaced since."""
        with self._open(path) as file:
            status = os.fstat(file.fileno())
        # A copy may keep the time of writing, and no program can set the other one.
        return status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns}"

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Copy files, several at once. Never a link: what a step does to its input must not reach the source."""

        def copy(path: str) -> None:
            def fill(temporary: Path) -> None:
                with self._open(join_path(prefix, path)) as file, temporary.open("wb") as target:
                    shutil.copyfileobj(file, target, 1 << 20)

            atomic_files.write_atomically(folder / path, fill, os.replace)

        with ThreadPoolExecutor(_NUM_WORKERS) as pool:
            # Reading the results raises the first error.
            list(pool.map(copy, paths))

    def _open(self, path: str) -> BinaryIO:
        try:
            return local_files.open_file(self._path / validate_path(path), self._access)
        except FileNotFoundError:
            raise NotFound(f"{self._path.as_uri()}/{path}") from None


def glob_hint(path: Path) -> str:
    """Return how to write a path that is a glob, such as `data/*.jsonl`; empty for any other path."""
    first = next((i for i, part in enumerate(path.parts) if re.search(r"[*?\[{]", part)), None)
    if first is None:
        return ""
    folder, glob = Path(*path.parts[:first]), "/".join(path.parts[first:])
    return f'. Globs belong in files: {{uri: {folder}, files: ["{glob}"]}}'
