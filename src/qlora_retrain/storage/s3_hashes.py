"""The sha256 of objects in S3, by which a plan pins them.

An ETag is no pin: it is an MD5, of which two different files can have the same. S3's own SHA-256 checksum is taken
where an object has one (`aws s3 cp --checksum-algorithm SHA256`). Otherwise the object is read once. In a bucket with
versioning the result is remembered by the object's version, whose bytes never change (`planner_memory.py`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qlora_retrain.storage import planner_memory

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
    memory = planner_memory.place("object-hashes", bucket, key, str(version)) if is_fixed else None
    remembered = planner_memory.read(memory)
    if remembered is not None and re.fullmatch(r"[0-9a-f]{64}", remembered):
        return remembered

    sha256 = _hash_object(client, Bucket=bucket, Key=key, **({"VersionId": version} if is_fixed else {}))
    planner_memory.write(memory, sha256)
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
