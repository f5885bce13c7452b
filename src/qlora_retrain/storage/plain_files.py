"""Look at a folder that must hold certain files and nothing else: whoever loads a model opens what lies beside them.

`remove` takes away what does not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path


def first_foreign(folder: Path, names: Collection[str], owners: Collection[int] | None = None) -> str | None:
    """Return what a folder holds besides plain files of these names, or None; links, also to folders, are foreign.

    Args:
        folder: The folder.
        names: The relative paths of the files that may be there.
        owners: The users to whom all of it may belong, since an owner can change it at any time; None: anybody.
    """
    for path in (folder, *sorted(folder.rglob("*"))):
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return f"{name}: is a link"
        if not stat.S_ISDIR(status.st_mode):
            if name not in names:
                return f"{name}: does not belong here"
            # Opening a pipe would wait for ever.
            if not stat.S_ISREG(status.st_mode):
                return f"{name}: is no file"
        if owners is not None and status.st_uid not in owners:
            return f"{name}: belongs to another user"
    return None


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder as far as this user may; a link is not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    for folder, _, _ in os.walk(path):
        # Whoever protected a version from changes took the right to remove its files, too.
        with contextlib.suppress(OSError):
            Path(folder).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)
