"""Files that become visible in one step, and the errors of a disk in plain words: the parts of the local store.

`write_atomically` fills a hidden file beside the target and then publishes it with `publish_by_rename` or
`publish_by_link`. Both flush the file to the disk before, and its folder after.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage.store import RESERVED_PREFIX

# How often the deletes of other processes may get in the way of one write before it fails.
MAX_ATTEMPTS = 32
# A hidden file of this age has no writer any more, on whichever machine the writer was.
STALE_SECONDS = 24 * 3600
# The errors of `link` where there can be no link: another file system, one without links, too many links, no such call.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)

# The errors of a disk that fails, and of a file server that is away.
_UNRELIABLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN)
_OTHER_FILE_SYSTEM = "this file system lacks the links or the locks that are needed here: choose a folder on another"
# What a process or a file system does not allow, and what a person does about it.
_LIMITS = {
    errno.EFBIG: "this process (`ulimit -f`) or the file system has a limit for one file: raise it, or choose another "
    "disk",
    errno.EMFILE: "raise this process's limit of open files (`ulimit -n`) to 64 or more",
    errno.ENFILE: "raise this machine's limit of open files, or end what has many open",
    errno.ENOTSUP: _OTHER_FILE_SYSTEM,
    errno.ENOLCK: _OTHER_FILE_SYSTEM,
    errno.ENOSYS: _OTHER_FILE_SYSTEM,
}


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Translate the operating system's errors about a disk into ours.

    Raises:
        TryAgain: If the disk is full, or cannot be read or written for a while.
        UsageError: If we may not use `folder`, cannot have a file of that name in it, or reach a limit of this process.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            obstacle = _fullness(folder, error)
            raise TryAgain(f"{folder}: {obstacle}; make room, then run again", cause=Cause.DISK_FULL) from error
        if error.errno in _UNRELIABLE:
            raise TryAgain(
                f"{folder}: {error.strerror}: {error.filename or 'a file'}; run the same command again; if that stays "
                "so, look at the disk, or at the server that it is on"
            ) from error
        if error.errno in _LIMITS:
            name, remedy = error.filename or "a file", _LIMITS[error.errno]
            raise UsageError(f"{folder}: {error.strerror}: {name}; {remedy}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(
                f"{folder}: {error.strerror}: {error.filename}; let this user read and write that folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY):
            raise UsageError(f"{folder}: {error.strerror}: {error.filename}; choose another name") from error
        raise


def _fullness(folder: Path, error: OSError) -> str:
    """Return what a disk has too little of: room for bytes, or for the names of files."""
    with contextlib.suppress(OSError):
        status = os.statvfs(folder)
        # Where names take from the room for bytes, a disk that is full has none of either.
        if status.f_bavail and status.f_files and not status.f_favail:
            return f"the disk can hold no more files ({error.strerror}; `df -i` counts them)"
    return f"the disk is full ({error.strerror})"


def free_bytes(folder: Path) -> int | None:
    """Return how many bytes fit on the disk of a folder; None where its file system has no size."""
    # A tmpfs or a ramfs without a limit, and some file systems in user space.
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


@contextlib.contextmanager
def destination_errors(folder: Path) -> Iterator[None]:
    """Translate the operating system's errors about a folder that a person named, into which this process writes.

    Raises:
        TryAgain: If the disk is full.
        UsageError: If the folder cannot be made, or something else has its place.
    """
    try:
        with disk_errors(folder):
            yield
    except (FileExistsError, FileNotFoundError) as error:
        obstacle = (
            "something that is no folder" if isinstance(error, FileExistsError) else "nothing, and it cannot be made"
        )
        raise UsageError(
            f"{folder}: expected a folder at {error.filename or folder}, found {obstacle}; choose another destination"
        ) from error


def write_atomically(target: Path, fill: Callable[[Path], object], publish: Callable[[Path, Path], object]) -> None:
    """Fill a hidden file beside `target`, then publish it; the hidden file is removed whatever happens.

    Args:
        target: The file that becomes visible.
        fill: Writes the hidden file.
        publish: Moves or links the hidden file to `target`.
    """
    # The name says which process of which machine writes it, so that others can tell when that writer is gone.
    temporary = target.with_name(f"{RESERVED_PREFIX}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}")

    for attempt in range(1, MAX_ATTEMPTS + 1):
        with disk_errors(target.parent):
            try:
                make_folder(target.parent)
                fill(temporary)
                publish(temporary, target)
                return
            except FileNotFoundError:
                # A delete of another process took the hidden file, or the folder while that was still empty.
                if attempt == MAX_ATTEMPTS:
                    raise
            finally:
                # Also after a rename, which does nothing where both names are links to one file already.
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    temporary.unlink()


def publish_by_rename(temporary: Path, target: Path) -> None:
    """Put the file at `target` and replace what is there."""
    _settle(temporary)
    temporary.replace(target)
    _flush(target.parent)


def publish_by_link(temporary: Path, target: Path) -> None:
    """Put the file at `target`; raise `FileExistsError` where there is a file already."""
    _settle(temporary)
    try:
        os.link(temporary, target)
    except FileExistsError:
        # A folder of that name is no document that was written before: it is another error.
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "there is a folder of that name", str(target)) from None
        raise
    _flush(target.parent)


def _settle(temporary: Path) -> None:
    """Make the file readable by all, whatever the umask, and flush it to the disk."""
    if temporary.stat().st_mode & 0o777 != 0o644:
        temporary.chmod(0o644)
    _flush(temporary)


def _flush(path: Path) -> None:
    """Flush a file or a folder to the disk: after a power cut, a name without its content would be a damaged file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, target)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, readable by all."""
    if not folder.is_dir():
        make_folder(folder.parent)
        # Another process may make the folder first, or remove it while it is empty.
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            folder.mkdir()
            folder.chmod(0o755)


def remove_empty_folders(folder: Path, root: Path) -> None:
    """Remove the folder and its parents below the root, while they hold nothing but hidden files of dead writers."""
    while folder != root:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for leftover in folder.glob(f"{RESERVED_PREFIX}*"):
                if _is_abandoned(leftover):
                    leftover.unlink(missing_ok=True)

        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:  # not empty: it holds somebody's file
            return
        folder = folder.parent


def _is_abandoned(hidden: Path) -> bool:
    """Return whether a hidden file's writer is gone.

    This can be wrong: in a container the same host name and process id may mean another process. It does no harm, since
    `write_atomically` then fills another hidden file.
    """
    # .store-<host>-<process id>-<random>; a host's name may hold hyphens too.
    host, _, pid = hidden.name.removeprefix(RESERVED_PREFIX).rpartition("-")[0].rpartition("-")
    if host == platform.node() and pid.isdigit():
        try:
            os.kill(int(pid), 0)  # signal 0 only asks whether there is such a process
        except ProcessLookupError:
            return True
        except PermissionError:  # there is one, of another user
            return False

    # The writer is on another machine, or its process id is in use, perhaps by another process: only the age can tell.
    return time.time() - hidden.stat().st_mtime > STALE_SECONDS


def visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of the folder that are not hidden; none where there is no such folder."""
    try:
        with os.scandir(folder) as scan:
            return [entry for entry in scan if not entry.name.startswith(RESERVED_PREFIX)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk_files(folder: str | Path, visited_folders: set[tuple[int, int]] | None = None) -> Iterator[os.DirEntry[str]]:
    """Yield every file below the folder that is not hidden; links to folders are followed.

    Each folder is walked once, by whatever name it is reached first: two links to their own folder have 2^40 names.
    """
    visited_folders = set() if visited_folders is None else visited_folders
    for entry in visible_entries(folder):
        if not entry.is_dir():
            yield entry
            continue
        with contextlib.suppress(FileNotFoundError):  # removed while this walks
            identity = entry.stat()
            if (identity.st_dev, identity.st_ino) not in visited_folders:
                visited_folders.add((identity.st_dev, identity.st_ino))
                yield from walk_files(entry.path, visited_folders)
