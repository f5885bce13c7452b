"""Addresses: one canonical JSON and one hash of everything that determines an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def canonical(value: Any) -> bytes:
    """Value as JSON with sorted keys and no white space; raises `ValueError` for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """64 hex of sha256 over the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """64 hex of sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """64 hex of the file's sha256, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def step_key(step: str, identity: Mapping[str, Any], inputs: Mapping[str, str | None], code: str) -> str:
    """The key of what a step makes.

    Args:
        step: The step's name.
        identity: Its identity fields, as JSON values.
        inputs: The key of each thing it reads; None for an optional source that is absent.
        code: Its code identity.
    """
    return digest({"step": step, "config": identity, "inputs": inputs, "code": code})


def content_hash(files: Iterable[tuple[str, str]]) -> str:
    """The hash of a set of (path, sha256) pairs, whatever their order."""
    return digest(sorted(files))


def parse(data: bytes) -> Any:
    """JSON from a store's document; raises `ValueError`."""
    return json.loads(data)
