"""Retention: for some days nobody can delete or replace what was published, in a bucket with S3's object lock.

A bucket without object lock, and a store in a folder, have none. The mode is GOVERNANCE, which only a role with
`s3:BypassGovernanceRetention` can end early; no role of this project has that.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from qlora_retrain.core import uris
from qlora_retrain.storage import s3_errors
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import Store

# A bucket without object lock, and servers that have none at all.
_NO_LOCK = ("InvalidRequest", "ObjectLockConfigurationNotFoundError", "NotImplemented", "MethodNotAllowed")
_NUM_WRITERS = 8


def retain(store: Store, paths: Iterable[str], days: int) -> bool:
    """Keep files from being deleted or replaced for some days from now on; an earlier, longer retention stays.

    Returns:
        Whether the store has retention.

    Raises:
        UsageError: If this role may not set it.
        TryAgain: If the server is busy.
    """
    paths = list(paths)
    if days == 0 or not paths or not isinstance(store, S3Store):
        return False
    until = datetime.now(UTC) + timedelta(days=days)
    # The first alone: where there is no object lock, no further request is made.
    if not _retain_file(store, paths[0], until):
        return False
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        return all(pool.map(lambda path: _retain_file(store, path, until), paths[1:]))


def _retain_file(store: S3Store, path: str, until: datetime) -> bool:
    """Set the retention of a file; return False where the bucket has no object lock."""
    from botocore.exceptions import ClientError

    bucket, prefix = uris.bucket_and_prefix(store.uri)
    key = f"{prefix}/{path}" if prefix else path
    lock = {"Mode": "GOVERNANCE", "RetainUntilDate": until}
    with s3_errors.translate_errors(f"cannot retain {store.uri}/{path}", lambda: False):
        try:
            store.client.put_object_retention(Bucket=bucket, Key=key, Retention=lock)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in _NO_LOCK:
                return False
            # So S3 also answers a time that is earlier than the one that is set: the setting was longer before.
            if code != "AccessDenied" or not _is_retained(store, bucket, key, until):
                raise
    return True


def _is_retained(store: S3Store, bucket: str, key: str, until: datetime) -> bool:
    # The answer has this date only for a role with `s3:GetObjectRetention`.
    current = store.client.head_object(Bucket=bucket, Key=key).get("ObjectLockRetainUntilDate")
    return current is not None and bool(current >= until)
