"""The sha256 of objects in S3, by which a plan pins them.

An ETag is no pin: it is an MD5, of which two different files can have the same. S3's own SHA-256 checksum is taken
where an object has one (`aws s3 cp --checksum-algorithm SHA256`). Otherwise the object is read once. In a bucket with
versioning the result is remembered by the object's version, whose bytes never change.

Environment: `XDG_STATE_HOME`, else `~/.local/state`: the memory is in `qlora-retrain/object-hashes` below it. It is the
planner's alone and not in the node cache, which steps can write to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20
_NUM_READERS = 8


def sha256_of_objects(client: Any, bucket: str, keys: Iterable[str]) -> list[str]:
    """Return the sha256 of each object, as 64 hex digits; several are read at once."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(lambda key: _sha256_of_object(client, bucket, key), keys))


def _sha256_of_object(client: Any, bucket: str, key: str) -> str:
    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    if (own := _own_checksum(head)) is not None:
        return own

    version = head.get("VersionId")
    # Without versioning the next reader may find other bytes under the same name.
    is_fixed = version not in (None, "", "null")
    memory = _memory(bucket, key, version) if is_fixed else None
    if memory is not None and (remembered := _read(memory)) is not None:
        return remembered

    sha256 = _hash_object(client, Bucket=bucket, Key=key, **({"VersionId": version} if is_fixed else {}))
    if memory is not None:
        _write(memory, sha256)
    return sha256


def _hash_object(client: Any, **which: str) -> str:
    """Read the object and return its hash."""
    digest = hashlib.sha256()
    for chunk in client.get_object(**which)["Body"].iter_chunks(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _own_checksum(head: dict[str, Any]) -> str | None:
    """Return the checksum that S3 computed of the whole object; None without one, or for one of its parts alone."""
    text = head.get("ChecksumSHA256") or ""
    if head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT" or "-" in text:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data.hex() if len(data) == hashlib.sha256().digest_size else None


def _memory(bucket: str, key: str, version: str) -> Path | None:
    """Return where the hash of an object's version is remembered; None where others could write there."""
    state = os.environ.get("XDG_STATE_HOME")
    folder = (Path(state) if state else Path("~/.local/state").expanduser()) / "qlora-retrain" / "object-hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return folder / hashlib.sha256(f"{bucket}\n{key}\n{version}".encode()).hexdigest()


def _read(memory: Path) -> str | None:
    try:
        text = memory.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _write(memory: Path, sha256: str) -> None:
    # A full or read-only disk costs the next plan time, and nothing else.
    with contextlib.suppress(OSError):
        temporary = memory.with_name(f".{uuid.uuid4().hex}")
        temporary.write_text(sha256, encoding="ascii")
        temporary.replace(memory)
