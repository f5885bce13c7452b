"""Mark and verify checkpoints: one is valid only if its marker, written last, lists every file with its hash.

    <scratch>/checkpoint-<step>/...files
    <scratch>/checkpoint-<step>/_complete.json    {"step": n, "files": [{"path", "size", "sha256"}, ...]}

Somebody else may have written any of it. So no file of a checkpoint is opened before all of them verify, and every
marker, wherever it comes from, is read by `parse_marker`. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core.progress import say

MARKER = "_complete.json"
# A checkpoint of 64 processes has some 70 files and a marker of 10 KB.
MAX_MARKER_BYTES = 2**20
MAX_FILES = 1000
# ASCII digits alone, and few enough for any counter.
_NAME = re.compile(r"checkpoint-([0-9]{1,9})")
# No part begins with a dot. So there is no `..`, no hidden file and no name that a store reserves.
_FILE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class InvalidCheckpoint(Exception):
    """A checkpoint cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file of a checkpoint, as its marker lists it."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of a marker: the optimizer step, and the files by their paths in the checkpoint's folder."""

    step: int
    files: Mapping[str, CheckpointFile]

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size_bytes for file in self.files.values())


def parse_marker(data: bytes, step: int) -> Marker:
    """Return what a marker says about the checkpoint of this step.

    Raises:
        InvalidCheckpoint: If it is no marker of that step, or lists a path that may lead out of its folder.
    """
    if len(data) > MAX_MARKER_BYTES:
        raise InvalidCheckpoint(f"{MARKER} is larger than {MAX_MARKER_BYTES} bytes")
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{MARKER} cannot be read: {error}") from error

    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, list) or not 0 < len(files) <= MAX_FILES:
        raise InvalidCheckpoint(f"{MARKER} cannot be read: it has no list of 1 to {MAX_FILES} files")
    # The step in the name decides which checkpoint is the newest, so it must be the true one.
    if type(document.get("step")) is not int or document["step"] != step:
        raise InvalidCheckpoint(f"{MARKER} says step {str(document.get('step'))[:20]}, but the folder says {step}")

    listed = dict(_parse_file(entry) for entry in files)
    if len(listed) < len(files):
        raise InvalidCheckpoint(f"{MARKER} lists a file twice")
    return Marker(step, listed)


def _parse_file(entry: Any) -> tuple[str, CheckpointFile]:
    """Return path, size and hash of an entry of a marker's list."""
    path, size, sha256 = (entry.get(k) if isinstance(entry, dict) else None for k in ("path", "size", "sha256"))
    if not isinstance(path, str) or not _FILE_PATH.fullmatch(path) or path == MARKER:
        raise InvalidCheckpoint(f"{MARKER} lists {str(path)[:100]!r}, which is no path of a checkpoint's file")
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise InvalidCheckpoint(f"{MARKER} has no size and sha256 of {path}")
    return path, CheckpointFile(size, sha256)


def write_marker(folder: Path, step: int) -> None:
    """Write the marker of a checkpoint whose files are all there.

    Args:
        folder: `checkpoint-<step>`.
        step: The number of optimizer steps that are done.
    """
    files = [
        {"path": name, "size": path.stat().st_size, "sha256": _sha256(path)}
        for name, path in sorted(_files(folder).items())
    ]

    # A rename is atomic, so a process that dies here leaves no marker or a whole one, never half of one.
    temporary = folder / f"{MARKER}.part"
    temporary.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MARKER)


def invalid_reason(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used.

    Returns:
        None where every file is as the marker lists it, and there is no other file.
    """
    try:
        with (folder / MARKER).open("rb") as file:
            listed = parse_marker(file.read(MAX_MARKER_BYTES + 1), step_of(folder)).files
    except FileNotFoundError:
        return f"has no {MARKER}: the save was cut off"
    except InvalidCheckpoint as error:
        return str(error)
    except OSError as error:
        return f"{MARKER} cannot be read: {error}"

    files = _files(folder)
    if missing := sorted(listed.keys() - files.keys()):
        return f"{missing[0]} is missing"
    # A file that is not listed may be a pickle that somebody put there.
    if extra := sorted(files.keys() - listed.keys()):
        return f"{extra[0]} is not in {MARKER}"

    for name, expected in listed.items():
        path = files[name]
        if path.is_symlink() or not path.is_file():
            return f"{name} is no plain file"
        # The size is checked first: it needs no read, and it differs where a checkpoint was cut off.
        if path.stat().st_size != expected.size_bytes:
            return f"{name} has {path.stat().st_size} bytes where {expected.size_bytes} were written"
        if _sha256(path) != expected.sha256:
            return f"{name} has another sha256 than the one written"
    return None


def newest_valid(scratch: Path, unusable_reason: Callable[[Path], str | None] = lambda _: None) -> Path | None:
    """Return the valid checkpoint of the highest step, and log why newer ones were skipped.

    Args:
        scratch: The folder with the checkpoints.
        unusable_reason: Says why a checkpoint that verifies cannot be used all the same, or returns None.
    """
    for folder in reversed(sorted_checkpoints(scratch)):
        reason = invalid_reason(folder) or unusable_reason(folder)
        if reason is None:
            return folder
        say(f"skipped {folder.name}: {reason}")
    return None


def sorted_checkpoints(scratch: Path) -> list[Path]:
    """Return every checkpoint folder, valid or not, in the order of their steps."""
    folders = [path for path in scratch.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name, or -1 where there is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _files(folder: Path) -> dict[str, Path]:
    """Return everything in a checkpoint that is not a folder or the marker itself, by relative path."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    marker_names = {MARKER, f"{MARKER}.part"}
    # A link to a folder is listed too, so that `invalid_reason` refuses it.
    return {
        name: path
        for name, path in names.items()
        if name not in marker_names and (path.is_symlink() or not path.is_dir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
