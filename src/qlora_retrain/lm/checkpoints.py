"""Mark and verify checkpoints: one is valid only if its marker, written last, lists every file with its hash.

    <scratch>/checkpoint-<step>/...files
    <scratch>/checkpoint-<step>/_complete.json    {"step": n, "files": [{"path", "size", "sha256"}, ...]}

Checkpoints hold pickles, so no file of one is opened before all of them verify. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from qlora_retrain.core.progress import say

MARKER = "_complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


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
        marker: Any = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        step = int(marker["step"])
        listed = {str(f["path"]): (int(f["size"]), str(f["sha256"])) for f in marker["files"]}
    except FileNotFoundError:
        return f"has no {MARKER}: the save was cut off"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} cannot be read: {error!r}"

    # The step in the name decides which checkpoint is the newest, so it must be the true one.
    if step != step_of(folder):
        return f"{MARKER} says step {step}, but the folder is {folder.name}"

    files = _files(folder)
    if missing := sorted(listed.keys() - files.keys()):
        return f"{missing[0]} is missing"
    # A file that is not listed may be a pickle that somebody put there.
    if extra := sorted(files.keys() - listed.keys()):
        return f"{extra[0]} is not in {MARKER}"

    for name, (size, sha256) in listed.items():
        path = files[name]
        if path.is_symlink() or not path.is_file():
            return f"{name} is no plain file"
        # The size is checked first: it needs no read, and it differs where a checkpoint was cut off.
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes where {size} were written"
        if _sha256(path) != sha256:
            return f"{name} has another sha256 than the one written"
    return None


def newest_valid(scratch: Path) -> Path | None:
    """Return the valid checkpoint of the highest step, and log why newer ones were skipped."""
    for folder in reversed(sorted_checkpoints(scratch)):
        reason = invalid_reason(folder)
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
