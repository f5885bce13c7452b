"""The documents in the folder of a pulled version, which anybody may have changed since they were written.

<version>/_pulled.json     the record: what was pulled, and the newest generation of every reference pulled into DEST
<version>/manifest.json    the version's manifest
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from qlora_retrain.core import json_depth
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import is_valid_path


class _Record(BaseModel):
    """What the next pull compares with; an earlier release wrote neither `signers` nor `manifests`."""

    line: str
    version: str
    newest: dict[str, tuple[int, str]] = Field(alias="seen")
    signers: dict[str, str] = {}
    manifests: dict[str, str] = {}


class _Listing(BaseModel):
    files: tuple[File, ...]


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a file; raise `OSError` or `ValueError` where no pull wrote it."""
    record = json_depth.loads(path.read_text())
    _Record.model_validate(record)
    return dict(record)


def listed_files(manifest: Path) -> list[File]:
    """Return the files that a manifest lists; none where it is no manifest."""
    try:
        listing = _Listing.model_validate_json(manifest.read_bytes())
    except (OSError, ValueError):
        return []
    return [file for file in listing.files if is_valid_path(file.path)]
