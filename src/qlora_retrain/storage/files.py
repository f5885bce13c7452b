"""Files that become visible in one step, and what a disk can answer: what the local store is made of.

`place` fills a hidden file beside the target and then publishes it with `replace` or `link`; both flush it to the disk
first, and its folder after.
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

from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.storage.store import RESERVED

TRIES = 8  # how often another's delete may get in the way of one write before we give up
STALE_SECONDS = 24 * 3600  # a hidden file of this age has no writer any more, wherever that was
# What `link` says where it cannot: another file system, none of its kind here, too many links, no such call.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Say in our words what the operating system says about a disk.

    Raises:
        TryAgain: If it is full.
        UsageError: If we may not use `folder`, or cannot have a file of that name in it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TryAgain(f"{folder}: the disk is full ({error.strerror}); make room, then run again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(
                f"{folder}: {error.strerror}: {error.filename}; let this user read and write that folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise UsageError(f"{folder}: {error.strerror}: {error.filename}; choose another name") from error
        raise


def place(target: Path, fill: Callable[[Path], object], publish: Callable[[Path, Path], object]) -> None:
    """Fill a hidden file beside `target`, then publish it; whatever happens, the hidden file goes."""
    temporary = target.with_name(f"{RESERVED}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}")
    for attempt in range(1, TRIES + 1):
        with disk_errors(target.parent):
            try:
                make_folder(target.parent)
                fill(temporary)
                publish(temporary, target)
                return
            except FileNotFoundError:  # a delete took the hidden file, or the folder while that was still empty
                if attempt == TRIES:
                    raise
            finally:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    temporary.unlink()  # also after a rename: between two links of one file it does nothing


def replace(temporary: Path, target: Path) -> None:
    """Put the file at `target`, whatever is there."""
    _settle(temporary)
    temporary.replace(target)
    _flush(target.parent)


def link(temporary: Path, target: Path) -> None:
    """Put the file at `target`; raises `FileExistsError` where a file is there already."""
    _settle(temporary)
    try:
        os.link(temporary, target)
    except FileExistsError:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "there is a folder of that name", str(target)) from None
        raise
    _flush(target.parent)


def _settle(temporary: Path) -> None:
    if temporary.stat().st_mode & 0o777 != 0o644:
        temporary.chmod(0o644)
    _flush(temporary)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file, or a second file where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, target)


def make_folder(folder: Path) -> None:
    """The folder and those above it, readable by all."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o755)


def prune(folder: Path, root: Path) -> None:
    """Remove the folder and those above it, below the root, as far as only dead writers' files are left in them."""
    while folder != root:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for leftover in folder.glob(f"{RESERVED}*"):
                if _is_abandoned(leftover):
                    leftover.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        folder = folder.parent


def _is_abandoned(hidden: Path) -> bool:
    """Whether a hidden file's writer is gone; `place` fills another where this is wrong, as in a process namespace."""
    host, _, pid = hidden.name.removeprefix(RESERVED).rpartition("-")[0].rpartition("-")
    if host == platform.node() and pid.isdigit():
        try:
            os.kill(int(pid), 0)  # asks only whether there is such a process
        except ProcessLookupError:
            return True
        except PermissionError:  # there is, another user's
            return False
    return time.time() - hidden.stat().st_mtime > STALE_SECONDS


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in the folder and not hidden; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(RESERVED)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Every file below the folder that is not hidden; links to folders are followed."""
    for entry in entries(folder):
        if entry.is_dir():
            yield from files(entry.path)
        else:
            yield entry
