"""Addresses of artifacts: one canonical JSON, and one hash of everything that determines an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Return the value as JSON with sorted keys and no white space; raise `ValueError` for NaN and infinities."""
    # Every key in every store depends on these four options: if one changed, no existing artifact would be found again.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """Return the sha256 of the value's canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Return the sha256 of the bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of the file's bytes, as 64 hex digits."""
    with path.open("rb") as stream:
        return sha256_stream(stream)


def sha256_stream(stream: BinaryIO) -> str:
    """Return the sha256 of what is left to read, as 64 hex digits."""
    return hasher_of(stream).hexdigest()


def hasher_of(stream: BinaryIO) -> hashlib._Hash:
    """Return the sha256 of what is left to read, to which more can be added."""
    hasher = hashlib.sha256()
    # In chunks, because a shard of a model has several GiB and must not be in memory as a whole.
    while chunk := stream.read(_CHUNK_BYTES):
        hasher.update(chunk)
    return hasher


def step_key(step: str, identity: Mapping[str, Any], inputs: Mapping[str, str | None], code: str) -> str:
    """Return the key of the artifact that a step makes.

    Args:
        step: The step's name.
        identity: The identity fields of the step's section, as JSON values.
        inputs: The key of each input; None for an optional source that is absent.
        code: The hash of the step's code.
    """
    # The names of these four fields are part of every key.
    return sha256_json({"step": step, "config": identity, "inputs": inputs, "code": code})


def content_hash(files: Iterable[tuple[str, str]]) -> str:
    """Return the hash of a set of (path, sha256) pairs, whatever their order."""
    return sha256_json(sorted(files))
