"""Checkpoints that can be trusted: a folder counts once its marker, written last, lists every file with its hash.

    <scratch>/checkpoint-<step>/...files
    <scratch>/checkpoint-<step>/_complete.json    {"step": n, "files": [{"path", "size", "sha256"}, ...]}

Checkpoints hold pickles, so nothing in one is opened before it verifies. Standard library only.
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


def complete(folder: Path, step: int) -> None:
    """Write the marker of a checkpoint whose files are all there; temporary name first, so that it is whole or absent.

    Args:
        folder: `checkpoint-<step>`.
        step: Optimizer steps that were done.
    """
    files = [
        {"path": name, "size": path.stat().st_size, "sha256": _sha256(path)}
        for name, path in sorted(_files(folder).items())
    ]
    temporary = folder / f"{MARKER}.part"
    temporary.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MARKER)


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where every file is what its marker says and nothing else is there."""
    try:
        marker: Any = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        step = int(marker["step"])
        listed = {str(f["path"]): (int(f["size"]), str(f["sha256"])) for f in marker["files"]}
    except FileNotFoundError:
        return f"has no {MARKER}: the save was cut off"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} cannot be read: {error!r}"
    if step != step_of(folder):
        return f"{MARKER} says step {step}, its folder is {folder.name}"
    found = _files(folder)
    if missing := sorted(listed.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(found.keys() - listed.keys()):
        return f"{extra[0]} is not in {MARKER}"
    for name, (size, sha256) in listed.items():
        path = found[name]
        if path.is_symlink() or not path.is_file():
            return f"{name} is no plain file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes where {size} were written"
        if _sha256(path) != sha256:
            return f"{name} has another sha256 than the one written"
    return None


def newest_valid(scratch: Path) -> Path | None:
    """The checkpoint of the highest step that verifies; those passed over are named with the reason."""
    for folder in reversed(found(scratch)):
        reason = verify(folder)
        if reason is None:
            return folder
        say(f"passed over {folder.name}: {reason}")
    return None


def found(scratch: Path) -> list[Path]:
    """Every checkpoint folder, complete or not, by step."""
    folders = [path for path in scratch.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, -1 where there is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _files(folder: Path) -> dict[str, Path]:
    """Everything in a checkpoint that is not a folder or the marker itself, by relative path."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    own = {MARKER, f"{MARKER}.part"}
    return {name: path for name, path in names.items() if name not in own and (path.is_symlink() or not path.is_dir())}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
