"""The folder beside an export's destination in which its files are assembled, so that each appears by a rename.

PARENT/.export-<hash>/lock      held by the export that is under way
PARENT/.export-<hash>/files/    whole or cut off, until they are moved to their places

An export that was interrupted, or ended with "try again", leaves the folder, and the same export goes on in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError

_LOCK = "lock"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@contextlib.contextmanager
def assembling(parent: Path, name: str) -> Iterator[Path]:
    """Lend a folder for the files of an export; wait where another process uses it.

    Args:
        parent: The folder of the destination; it exists.
        name: What is exported there, so that the same export finds the same folder.
    """
    folder = folder_of(parent, name)
    handle = _lock(folder)
    if handle is None:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as temporary:
            yield Path(temporary)
        return

    try:
        files = folder / "files"
        files.mkdir(exist_ok=True)
        try:
            yield files
        except BaseException as error:
            # What an interrupted export has so far is of use to the next one; bytes that differ are not.
            if isinstance(error, IntegrityError) or not any(files.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
    finally:
        os.close(handle)  # which releases the lock


def folder_of(parent: Path, name: str) -> Path:
    """Return the folder of an export; its name is short, whatever the destination's is."""
    return parent / f".export-{hashing.sha256_json(name)[:12]}"


def _lock(folder: Path) -> int | None:
    """Make the folder and hold its lock; None where somebody else has put one there, who could exchange its files."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        # The export that held the lock may remove the folder at any moment; then it is made again.
        with contextlib.suppress(FileNotFoundError):
            status = folder.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if not is_own or status.st_mode & _OTHERS_MAY_WRITE:
                return None
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), (folder / _LOCK).stat()):
                    return handle
            os.close(handle)
