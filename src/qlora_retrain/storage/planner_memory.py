"""What the planner remembers of sources whose bytes never change: small texts, by what they are about.

Environment: `XDG_STATE_HOME`, else `~/.local/state`: the memory is in `qlora-retrain` below it. It is the planner's
alone and not in the node cache, which steps can write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import uuid
from pathlib import Path


def place(kind: str, *ids: str) -> Path | None:
    """Return where something is remembered; None where others could write there."""
    state = os.environ.get("XDG_STATE_HOME")
    folder = (Path(state) if state else Path("~/.local/state").expanduser()) / "qlora-retrain" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return folder / hashlib.sha256("\n".join(ids).encode()).hexdigest()


def read(memory: Path | None) -> str | None:
    """Return what is remembered there; None for nothing."""
    try:
        return memory.read_text(encoding="utf-8") if memory else None
    except (OSError, UnicodeDecodeError):
        return None


def write(memory: Path | None, text: str) -> None:
    """Remember a text."""
    if memory is None:
        return
    # A full or read-only disk costs the next plan time, and nothing else.
    with contextlib.suppress(OSError):
        temporary = memory.with_name(f".{uuid.uuid4().hex}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(memory)
