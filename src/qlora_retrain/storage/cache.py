"""The node cache: inputs as read-only folders on this machine, each file checked by hash at every use.

Pods may share the cache over a network. The files that a step writes are larger and only that step reads them, so they
can be in another folder, on a local disk.

Environment: `QLORA_RETRAIN_CACHE`, the cache's folder; `QLORA_RETRAIN_WORK`, the folder for the steps' own files, else
`work` in the cache; `QLORA_RETRAIN_CACHE_GIB`, its size, see `cache_room.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import atomic_files, cache_room, plain_files
from qlora_retrain.storage.artifact import File

# The name of a folder that a step writes in. Where the disk is shared, another lock file there is somebody else's.
_WORK_NAME = re.compile(r"[0-9a-f]{12}")


def cache_folder() -> Path:
    """Return the cache's folder: `QLORA_RETRAIN_CACHE`, else the user's cache folder."""
    configured = os.environ.get("QLORA_RETRAIN_CACHE")
    return Path(configured) if configured else Path("~/.cache/qlora-retrain").expanduser()


def fetch(name: str, key: str, download: Callable[[Path], None], files: tuple[File, ...]) -> Path:
    """Return a local folder with the content `key`, downloading it if the cache does not have it intact.

    It stays until the block of `work_folder` ends in which it was fetched; without such a block, until this process
    ends. For a download, folders that nobody uses make room.

    Args:
        name: The input's name, a folder of the cache.
        key: The content's address.
        download: Fills an empty folder. It is called where the cache has no such content, or a damaged copy.
        files: The files that must be there and no others, by hash. They come from a plan or a manifest, never from the
            cache, which others can write to.

    Raises:
        IntegrityError: If a fresh download is not what `files` promises.
        UsageError: If somebody else's folder is in its place, and cannot be removed, or this user may not write there.
        TryAgain: If the disk is full.
    """
    target = cache_folder() / name / key
    cache_room.use(cache_folder(), target)
    try:
        with atomic_files.disk_errors(cache_folder()):
            return _fetch(name, target, download, files)
    except BaseException:
        cache_room.forget(cache_folder(), target)
        raise


def _fetch(name: str, target: Path, download: Callable[[Path], None], files: tuple[File, ...]) -> Path:
    # What belongs to another user can change after it was hashed.
    owners = (os.geteuid(), 0)
    if os.path.lexists(target):
        # Hashed at every use: a damaged file in a shared cache would harm every run on this node.
        if _fault(target, files, owners) is None:
            return target
        _remove(target)

    cache_room.make_room(cache_folder(), sum(file.size_bytes for file in files))
    atomic_files.make_folder(target.parent)
    # On the cache's own disk, so that one rename puts the complete folder in its place.
    with _folder_in(cache_folder() / "work") as work:
        temporary = work / name
        temporary.mkdir()
        download(temporary)
        fault = _fault(temporary, files)
        if fault is not None:
            raise IntegrityError(f"{name}: {fault}")

        # Read-only, so that a step that writes to its input fails instead of changing what others read.
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o444)
        try:
            temporary.rename(target)
        except OSError as error:
            # Another process may have been first; a folder that could not be removed is no such thing.
            if not os.path.lexists(target):
                raise
            fault = _fault(target, files, owners)
            if fault is not None:
                raise UsageError(f"{target}: {fault}, and it cannot be replaced: remove it") from error
    return target


def _fault(folder: Path, files: tuple[File, ...], owners: Collection[int] | None = None) -> str | None:
    """Return what is wrong with a folder, or None."""
    expected = [(f.path, f.sha256) for f in files]
    try:
        if foreign := plain_files.first_foreign(folder, {path for path, _ in expected}, owners):
            return foreign
    except OSError as error:
        return f"{error.filename}: {error.strerror}"

    for path, sha256 in expected:
        try:
            actual = hashing.sha256_file(folder / path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        if actual != sha256:
            return f"{path}: expected sha256 {sha256[:12]}, found {actual[:12]}"
    return None


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Make an empty folder for the files that a step writes: its output and its checkpoints."""
    configured = os.environ.get("QLORA_RETRAIN_WORK")
    parent = Path(configured) if configured else cache_folder() / "work"
    with cache_room.until_the_end_of_a_step(), _folder_in(parent) as folder:
        yield folder


@contextlib.contextmanager
def _folder_in(parent: Path) -> Iterator[Path]:
    """Make an empty folder that is removed after the block.

    Each folder has a lock file beside it, which its process holds locked. The kernel releases the lock of a process
    that was killed. So a lock that can be taken marks a folder that nobody uses any more, and that is removed first.
    """
    with atomic_files.disk_errors(parent):
        atomic_files.make_folder(parent)
    for stale in parent.glob("*.lock"):
        if not _WORK_NAME.fullmatch(stale.stem):
            continue
        # Another process may remove it, lock it or own it meanwhile: then it is not ours to clean.
        with contextlib.suppress(OSError), stale.open("rb+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(stale.with_suffix(""))
            stale.unlink(missing_ok=True)

    own_folder = parent / uuid.uuid4().hex[:12]
    lock = own_folder.with_suffix(".lock")
    with contextlib.ExitStack() as stack:
        with atomic_files.disk_errors(parent):
            own_lock = stack.enter_context(lock.open("wb"))
            fcntl.flock(own_lock, fcntl.LOCK_EX)
            # A step works here; no other user has to see what it makes.
            own_folder.mkdir(mode=0o700)
        try:
            yield own_folder
        finally:
            _remove(own_folder)
            lock.unlink(missing_ok=True)
