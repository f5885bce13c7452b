"""Open and list files that somebody else named: links are followed only to where it is allowed, and nothing blocks.

A path is resolved and checked, and then opened part by part without following any link. So a link that is put in
after the check is an error and no way out. Pipes, sockets and devices are refused before they are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess

# A tree of links to folders has more paths than files.
_MAX_ENTRIES = 1_000_000
# A folder that may be passed through need not be readable.
_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a link that changes"),
)


def open_file(path: Path, access: SourceAccess) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        FileNotFoundError: If it does not exist.
        UsageError: If it is no regular file, cannot be read, or leads to a place that is not allowed.
    """
    resolved = resolve(path, access)
    try:
        return _open_without_links(resolved, path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path, access: SourceAccess, max_bytes: int) -> str:
    """Return the text of a regular file of at most so many bytes.

    Raises:
        UsageError: As `open_file`, or if it does not exist, is larger, or is not UTF-8.
    """
    try:
        with open_file(path, access) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise UsageError(f"{path}: expected at most {max_bytes // 1024} KiB, found more")
        return data.decode("utf-8")
    # A zero byte in the path is a ValueError, and so is what is not UTF-8.
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def resolve(path: Path, access: SourceAccess) -> str:
    """Return the path without links.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        UsageError: If it is a link to nothing, or leads to a place that is not allowed.
    """
    try:
        resolved = os.path.realpath(path, strict=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise
        is_broken_link = isinstance(error, FileNotFoundError)
        reason = "a link to something that does not exist" if is_broken_link else f"cannot be read: {error.strerror}"
        raise UsageError(f"{path}: {reason}") from error
    if refusal := access.path_refusal(resolved):
        target = "" if resolved == str(path) else f"a link to {resolved}: "
        raise UsageError(f"{path}: {target}{refusal}")
    return resolved


def list_files(
    folder: Path, access: SourceAccess, is_included: Callable[[str], bool], may_hold: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Return the relative paths of the regular files below a folder that are included, and of all others.

    Links are followed. A path of the others that ends in a slash is a folder that was not looked into: a link, or one
    that cannot be listed, which holds nothing that is included.

    Args:
        folder: The folder.
        access: Where links may lead to.
        is_included: Whether a relative path is included.
        may_hold: Whether anything below a relative path can be included.

    Raises:
        UsageError: For an included path that is a pipe, a socket, a device or a link to nothing, and for a link to a
            folder that leads back or to a place that is not allowed.
    """
    files, others = list[Path](), list[str]()
    # Each with the resolved folders that it was reached through.
    folders: list[tuple[Path, tuple[str, ...]]] = [(folder, ())]
    num_entries = 0
    while folders:
        current, above = folders.pop()
        resolved = resolve(current, access)
        if resolved in above:
            raise UsageError(
                f"{current}: a link that leads back to {resolved}; remove it, or leave it out with `files`"
            )
        try:
            entries = list(os.scandir(resolved))
        except OSError as error:
            if current != folder and not may_hold(name := current.relative_to(folder).as_posix()):
                others.append(f"{name}/")
                continue
            raise UsageError(
                f"{current}: cannot be listed: {error.strerror}; leave it out with `files`, or let this user read it"
            ) from error
        num_entries += len(entries)
        if num_entries > _MAX_ENTRIES:
            raise UsageError(f"{folder}: expected at most {_MAX_ENTRIES:,} files and folders, found more")

        for entry in entries:
            path = current / entry.name
            name = path.relative_to(folder).as_posix()
            mode = _mode(path)
            if mode is not None and stat.S_ISDIR(mode):
                if entry.is_symlink() and not may_hold(name):
                    others.append(f"{name}/")
                else:
                    folders.append((path, (*above, resolved)))
            elif is_included(name):
                if mode is None or not stat.S_ISREG(mode):
                    kind = "a link to nothing, or to itself" if mode is None else _kind(mode)
                    raise UsageError(f"{path}: expected a file, found {kind}; leave it out with `files`")
                files.append(path)
            else:
                others.append(name)
    return [file.relative_to(folder).as_posix() for file in sorted(files)], sorted(others)


def _mode(path: Path) -> int | None:
    """Return the type of what a path leads to; None where it leads to nothing."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def _kind(mode: int) -> str:
    return next((text for is_kind, text in _KINDS if is_kind(mode)), "a device")


def _open_without_links(resolved: str, path: Path) -> BinaryIO:
    *parents, name = Path(resolved).parts
    folder = os.open(parents[0], _FOLDER_FLAGS) if parents else os.open("/", _FOLDER_FLAGS)
    try:
        for part in parents[1:]:
            parent, folder = folder, os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(parent)
        # Opening a device can already do something.
        if not stat.S_ISREG(mode := os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise UsageError(f"{path}: expected a file, found {_kind(mode)}")
        file = os.open(name, _FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(mode := os.fstat(file).st_mode):
        os.close(file)
        raise UsageError(f"{path}: expected a file, found {_kind(mode)}")
    return os.fdopen(file, "rb")
