"""Room in the node cache: which folders are in use, and which go, the least recently used first, when it is full.

<cache>/<name>/<key>/               an input
<cache>/locks/<name>-<key>.lock     its last use; locked (flock, shared) by each process that uses it

The kernel releases the lock of a process that was killed. A folder goes only while its lock is held alone, and in one
step, so that whoever asks for it next finds it whole or not at all.

Environment: `QLORA_RETRAIN_CACHE_GIB`, the size of the cache; without it, half of the disk that it is on.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import atomic_files

SIZE_VARIABLE = "QLORA_RETRAIN_CACHE_GIB"
# The name of an input's folder, a hash. A person may share the disk, and keeps other folders there: they stay.
_KEY = re.compile(r"[0-9a-f]{64}")
# What is being removed; a process that was killed leaves it, and the next one removes it.
_EVICTED = ".evicted-"
# The locks that this process holds, by the folder that is in use. The last list is that of the step under way.
_locks: list[list[tuple[Path, int]]] = [[]]


def use(cache: Path, folder: Path) -> None:
    """Keep a folder of the cache from being evicted, and remember that it was used just now.

    A cache that this process may not write to has no locks: then nothing of it is kept from other processes.
    """
    with contextlib.suppress(OSError):
        handle = _lock(_lock_path(cache, folder), fcntl.LOCK_SH)
        _locks[-1].append((folder, handle))
        os.utime(handle)


def forget(cache: Path, folder: Path) -> None:
    """Give up the use of a folder that could not be fetched."""
    for number, (used, handle) in enumerate(_locks[-1]):
        if used == folder:
            del _locks[-1][number]
            os.close(handle)
            break
    with contextlib.suppress(OSError):
        if not folder.exists():
            _evict(cache, folder)


@contextlib.contextmanager
def until_the_end_of_a_step() -> Iterator[None]:
    """Give up, after the block, the use of every folder that was used in it."""
    _locks.append([])
    try:
        yield
    finally:
        for _, handle in _locks.pop():
            os.close(handle)


def make_room(cache: Path, size_bytes: int) -> None:
    """Evict folders that nobody uses, until so many bytes more fit into the cache and on its disk, or none is left."""
    sizes_bytes = {folder: _size_bytes(folder) for folder in _inputs(cache)}
    excess_bytes = sum(sizes_bytes.values()) + size_bytes - _limit_bytes(cache)
    # What others have on the disk may leave less room than the cache may take.
    free_bytes = atomic_files.free_bytes(cache)
    if free_bytes is not None:
        excess_bytes = max(excess_bytes, size_bytes - free_bytes)
    for folder in sorted(sizes_bytes, key=lambda folder: _last_use(cache, folder)):
        if excess_bytes <= 0:
            return
        with contextlib.suppress(OSError):  # in use, or another process evicts it
            _evict(cache, folder)
            # Not on stdout, where `ask` prints answers.
            print(f"evicted {folder.parent.name} {folder.name[:12]} from the node cache", file=sys.stderr, flush=True)
            excess_bytes -= sizes_bytes[folder]


def _limit_bytes(cache: Path) -> float:
    """Return the size of the cache.

    Raises:
        UsageError: If the environment has no number.
    """
    atomic_files.make_folder(cache)
    text = os.environ.get(SIZE_VARIABLE)
    if not text:
        # A file system without a size sets no limit.
        return shutil.disk_usage(cache).total / 2 or math.inf
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < math.inf:
        raise UsageError(f"{SIZE_VARIABLE}={text}: expected a number of GiB above 0")
    return gib * 2**30


def _inputs(cache: Path) -> Iterator[Path]:
    """Yield the folders of the cache's inputs; remove what an eviction that was killed has left."""
    for name in atomic_files.visible_entries(cache):
        if name.is_dir(follow_symlinks=False):
            for entry in _entries_of_ours(name.path):
                if entry.name.startswith(_EVICTED):
                    shutil.rmtree(entry.path, ignore_errors=True)
                elif _KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)


def _entries_of_ours(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder; none where it is somebody else's, as is the lost+found of a disk."""
    try:
        return atomic_files.visible_entries(folder)
    except PermissionError:
        return []


def _size_bytes(folder: Path) -> int:
    size_bytes = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # being evicted
            size_bytes += file.lstat().st_size
    return size_bytes


def _last_use(cache: Path, folder: Path) -> float:
    for path in (_lock_path(cache, folder), folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _evict(cache: Path, folder: Path) -> None:
    """Remove a folder and its lock.

    Raises:
        OSError: If it is in use.
    """
    path = _lock_path(cache, folder)
    going = folder.with_name(f"{_EVICTED}{uuid.uuid4().hex[:12]}")
    handle = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(going)
        path.unlink()
    finally:
        os.close(handle)
    shutil.rmtree(going, ignore_errors=True)


def _lock(path: Path, operation: int) -> int:
    """Open and lock a lock file, which an eviction may remove at any time; return its handle."""
    atomic_files.make_folder(path.parent)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, operation)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed after it was opened: this is a lock that nobody else sees


def _lock_path(cache: Path, folder: Path) -> Path:
    return cache / "locks" / f"{folder.parent.name}-{folder.name}.lock"
