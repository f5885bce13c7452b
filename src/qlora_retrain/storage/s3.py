"""The store on S3, or on a server that speaks it, through boto3.

Endpoint, region and credentials come from the environment's own chain (AWS_ENDPOINT_URL, roles, mounted files).

A decision is one conditional `put_object`. When its answer is lost, boto3 sends it again, and the server says 412 to
our own write: so on 412 what is there is read and compared. boto3 sends nothing again on 409, and gives up on 503
too early: there is a loop around it. Files go up and down in parts with their sha256 in the metadata.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_retrain.core import uris
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.storage import s3_errors
from qlora_retrain.storage.files import disk_errors
from qlora_retrain.storage.store import Conflict, Entry, Exists, NotFound, Stored, checked, joined, probe

MIB = 1024**2
CONCURRENCY = 16
ROUNDS = 5  # of a conditional write, each with the attempts of boto3
PAUSE_SECONDS = 0.5  # doubles from round to round
BATCH = 1000  # most files that one request can delete


class S3Store:
    """A store below `s3://bucket/prefix`.

    Args:
        uri: Where.
        part_bytes: Files of this size or more travel in parts of this size (S3 wants 5 MiB or more), in parallel.
    """

    def __init__(self, uri: str, *, part_bytes: int = 32 * MIB) -> None:
        import boto3.session
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        self.uri = uris.absolute(uri)
        self._bucket, self._prefix = uris.bucket_and_prefix(self.uri)
        self._transfer = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_concurrency=CONCURRENCY,
            preferred_transfer_client="classic",  # the other one, taken on some machines, cannot copy
        )
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 8}, max_pool_connections=CONCURRENCY, connect_timeout=10
        )
        with self._errors("connect"):
            try:
                self.client = boto3.session.Session().client("s3", config=config)
            except ValueError as error:  # an endpoint that is no URL
                raise UsageError(f"{self.uri}: {error}") from error

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def read(self, path: str) -> Stored:
        """The document; its tag is its ETag."""
        with self._errors("read", path):
            answer = self.client.get_object(**self._at(path))
            return Stored(answer["Body"].read(), answer["ETag"])

    def write_if_absent(self, path: str, data: bytes) -> str:
        """Put with `If-None-Match: *`."""
        found = self._put(path, data, IfNoneMatch="*")
        if found.data != data:
            raise Exists(f"{self.uri}/{path}", found)
        return found.tag

    def swap(self, path: str, data: bytes, expected: str | None) -> str:
        """Put with `If-Match`."""
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            found = self._put(path, data, **condition)
        except NotFound as error:
            raise Conflict(str(error)) from None
        if found.data != data:
            raise Conflict(f"{self.uri}/{path}")
        return found.tag

    def list(self, prefix: str) -> Iterator[Entry]:
        """Page through the keys; one that ends with / is a console's idea of a folder, not a file."""
        start = len(self._key(""))
        with self._errors("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._below(prefix)
            )
            found = [
                Entry(item["Key"][start:], item["Size"], item["ETag"])
                for page in pages
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")
            ]
        return iter(sorted(found, key=lambda entry: entry.path))

    def children(self, prefix: str) -> Iterator[str]:
        """Let the server fold what is below each folder."""
        below = self._below(prefix)
        names: set[str] = set()
        with self._errors("list", prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=below, Delimiter="/"):
                names.update(item["Key"][len(below) :] for item in page.get("Contents", ()))
                names.update(item["Prefix"][len(below) : -1] for item in page.get("CommonPrefixes", ()))
        return iter(sorted(names - {""}))

    def upload(self, folder: Path, prefix: str, paths: Iterable[str]) -> None:
        """Hash each file while those before it travel; an error aborts the multipart uploads under way."""
        with disk_errors(folder), self._transfers("upload", prefix) as (manager, started):
            for path in paths:
                key = self._key(joined(prefix, path))
                with (folder / path).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                # CRC32: what boto3 can compute without its C runtime and S3 can check for files in parts.
                extra = {"Metadata": {"sha256": digest}, "ChecksumAlgorithm": "CRC32"}
                started.append((path, manager.upload(str(folder / path), self._bucket, key, extra_args=extra)))

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Get each file under a temporary name, then rename it (s3transfer does both)."""
        with disk_errors(folder), self._transfers("download", prefix) as (manager, started):
            for path in paths:
                key = self._key(joined(prefix, path))
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                started.append((path, manager.download(self._bucket, key, str(folder / path))))

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copy on the server, big files in parts."""
        with self._transfers("copy", "") as (manager, started):
            for source, target in pairs:
                key = self._key(checked(target))
                started.append((source, manager.copy(self._at(source), self._bucket, key)))

    def delete(self, paths: Iterable[str]) -> None:
        """Send the keys in batches."""
        keys = [{"Key": self._key(checked(path))} for path in paths]
        for start in range(0, len(keys), BATCH):
            batch = {"Objects": keys[start : start + BATCH], "Quiet": True}
            with self._errors("delete"):
                failed = self.client.delete_objects(Bucket=self._bucket, Delete=batch).get("Errors", ())
                for error in failed:
                    where = f"cannot delete s3://{self._bucket}/{error['Key']}"
                    raise s3_errors.ended(where, error["Code"], error.get("Message", ""), 200)

    def probe(self) -> None:
        """Expect 412 twice: some servers that speak S3 ignore both conditions, and overwrite."""
        probe(self)

    def _put(self, path: str, data: bytes, **condition: str) -> Stored:
        """Put under a condition and return what is there now: ours, or what stood in the way.

        Raises:
            NotFound: If something was expected and nothing is there.
            TryAgain: If the server never found the time.
        """
        from botocore.exceptions import ClientError

        for turn in range(ROUNDS):
            if turn:
                time.sleep(random.uniform(0.5, 1) * PAUSE_SECONDS * 2**turn)  # noqa: S311 - jitter, no secret
            with self._errors("write", path):
                try:
                    return Stored(data, self.client.put_object(**self._at(path), Body=data, **condition)["ETag"])
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    if code in ("NoSuchKey", "PreconditionFailed", "412"):
                        try:
                            return self.read(path)
                        except NotFound:  # where nothing was to be there, it was removed since: again
                            if "IfMatch" in condition:
                                raise
                    elif s3_errors.status(error) not in (409, 503):
                        raise
        raise TryAgain(f"{self.uri}/{path}: the server answered {ROUNDS} times that it is busy with this key")

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _below(self, prefix: str) -> str:
        return self._key(f"{checked(prefix)}/" if prefix else "")

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(checked(path))}

    @contextlib.contextmanager
    def _transfers(self, doing: str, prefix: str) -> Iterator[tuple[Any, builtins.list[tuple[str, Any]]]]:
        """A transfer manager, and where to note what it has begun: waited for at the end, cancelled on an error."""
        from boto3.s3.transfer import create_transfer_manager

        started: builtins.list[tuple[str, Any]] = []
        with create_transfer_manager(self.client, self._transfer) as manager:
            yield manager, started
            for path, future in started:
                with self._errors(doing, f"{prefix}/{path}" if prefix else path):
                    future.result()

    def _errors(self, doing: str, path: str = "") -> contextlib.AbstractContextManager[None]:
        return s3_errors.said(f"cannot {doing} {self.uri}/{path}".rstrip("/"), self._no_bucket)

    def _no_bucket(self) -> bool:
        from botocore.exceptions import ClientError

        try:
            self.client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            return s3_errors.status(error) == 404
        return False
