"""Uploads that were begun and never finished: parts of large files in a bucket, hidden files in a folder.

Nobody sees them in a listing, and both cost room until somebody removes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_retrain.core import uris
from qlora_retrain.storage import s3_errors
from qlora_retrain.storage.atomic_files import disk_errors
from qlora_retrain.storage.local import LOCK_FILE, LocalStore
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import RESERVED_PREFIX, Store


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """An upload that was begun.

    Attributes:
        path: The file that it would become; of a folder, the hidden file.
        id: By which the server knows it; empty in a folder.
        began_at: In seconds since 1970; in a folder, when it was last written to.
        size_bytes: Its size; 0 where the server does not say.
    """

    path: str
    id: str
    began_at: float
    size_bytes: int = 0


def find(store: Store) -> list[UnfinishedUpload]:
    """Return the uploads that are not finished, those under way too; sorted by path."""
    uploads: Iterable[UnfinishedUpload] = ()
    if isinstance(store, S3Store):
        uploads = _find_in_bucket(store)
    elif isinstance(store, LocalStore):
        uploads = _find_in_folder(store)
    return sorted(uploads, key=lambda upload: (upload.path, upload.id))


def abort(store: Store, uploads: Sequence[UnfinishedUpload]) -> None:
    """Remove them; one that is not there any more is no error."""
    if isinstance(store, S3Store):
        _abort_in_bucket(store, uploads)
    elif isinstance(store, LocalStore):
        root = uris.local_path(store.uri)
        with disk_errors(root):
            for upload in uploads:
                (root / upload.path).unlink(missing_ok=True)


def _find_in_bucket(store: S3Store) -> Iterator[UnfinishedUpload]:
    bucket, prefix = uris.bucket_and_prefix(store.uri)
    below = f"{prefix}/" if prefix else ""
    with s3_errors.translate_errors(f"cannot list the uploads of {store.uri}", lambda: False):
        pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=below)
        for page in pages:
            for item in page.get("Uploads", ()):
                path = item["Key"].removeprefix(below)
                # Some servers ignore the prefix, and somebody else may use the bucket beside a store in its root.
                if item["Key"].startswith(below) and path.partition("/")[0] in uris.STORE_FOLDERS:
                    yield UnfinishedUpload(path, item["UploadId"], item["Initiated"].timestamp())


def _abort_in_bucket(store: S3Store, uploads: Sequence[UnfinishedUpload]) -> None:
    from botocore.exceptions import ClientError

    bucket, prefix = uris.bucket_and_prefix(store.uri)
    for upload in uploads:
        key = f"{prefix}/{upload.path}" if prefix else upload.path
        with s3_errors.translate_errors(f"cannot abort the upload of {store.uri}/{upload.path}", lambda: False):
            try:
                store.client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload.id)
            except ClientError as error:
                if error.response["Error"]["Code"] != "NoSuchUpload":
                    raise


def _find_in_folder(store: LocalStore) -> Iterator[UnfinishedUpload]:
    root = uris.local_path(store.uri)
    with disk_errors(root):
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if name.startswith(RESERVED_PREFIX) and path != root / LOCK_FILE:
                    with contextlib.suppress(FileNotFoundError):  # its writer has finished
                        status = path.lstat()
                        yield UnfinishedUpload(path.relative_to(root).as_posix(), "", status.st_mtime, status.st_size)
