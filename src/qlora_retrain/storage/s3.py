"""The store on S3, or on a server that speaks its protocol, through boto3.

A document is written with one conditional `put_object`. When its answer is lost, boto3 sends it again, and the server
answers 412 (precondition failed) to our own write. So after a 412 the stored document is read and compared. boto3 does
not repeat a request after 409, and gives up too early on 503, so `_put` has a loop of its own. Files travel in parts
and are hashed in ranges, both in parallel.
"""

from __future__ import annotations

import builtins
import contextlib
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_retrain.core import uris
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage import s3_client, s3_errors, s3_hashes, s3_ranges
from qlora_retrain.storage.atomic_files import disk_errors
from qlora_retrain.storage.store import (
    AlreadyExists,
    Conflict,
    Document,
    Entry,
    NotFound,
    is_valid_path,
    join_path,
    probe,
    read_bounded,
    validate_path,
)

MIB = 1024**2
MAX_CONCURRENCY = 16  # connections, and parts that travel at once
COPIED_PARTS = 4  # that the server copies as one
MAX_ROUNDS = 5  # of a conditional write; boto3 makes several attempts in each
PAUSE_SECONDS = 0.5  # after the first round; it doubles from round to round
DELETE_BATCH_SIZE = 1000  # the most files that S3 deletes in one request


class S3Store:
    """A store below `s3://bucket/prefix`.

    Args:
        uri: The URI of the store.
        part_bytes: Files of this size or more travel in parts of this size, in parallel. S3 wants 5 MiB or more.
    """

    def __init__(self, uri: str, *, part_bytes: int = 8 * MIB) -> None:
        self.uri = uris.absolute(uri)
        self._bucket, self._prefix = uris.bucket_and_prefix(self.uri)
        self._part_bytes = part_bytes
        with self._errors("connect"):
            try:
                self.client = s3_client.connect(MAX_CONCURRENCY)
            except ValueError as error:  # AWS_ENDPOINT_URL is not a URL, or AWS_MAX_ATTEMPTS no number
                raise UsageError(f"{self.uri}: {error}") from error

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def read(self, path: str) -> Document:
        """Return the document; its tag is its ETag."""
        with self._errors("read", path):
            response = self.client.get_object(**self._at(path))
            return Document(read_bounded(response["Body"], f"{self.uri}/{path}"), response["ETag"])

    def read_start(self, path: str, size_bytes: int) -> bytes:
        """Get the first range."""
        return self.read_range(path, 0, size_bytes)

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        """Get with `Range`."""
        return s3_ranges.read_range(
            lambda value: self.client.get_object(**self._at(path), Range=value),
            lambda: self._errors("read", path),
            f"{self.uri}/{path}",
            start,
            size_bytes,
        )

    def sha256(self, path: str) -> str:
        """Hash the object while it arrives; what the server says of its own bytes proves nothing."""
        return s3_ranges.sha256(lambda start, size_bytes: self.read_range(path, start, size_bytes))

    def pinnable_hashes(self, paths: Iterable[str]) -> builtins.list[str]:
        """Return the sha256 of each file, the server's own where it has one."""
        with self._errors("read"):
            return s3_hashes.sha256_of_objects(self.client, self._bucket, [self._key(path) for path in paths])

    def write_if_absent(self, path: str, data: bytes) -> str:
        """Put with `If-None-Match: *`."""
        stored = self._put(path, data, IfNoneMatch="*")
        if stored.data != data:
            raise AlreadyExists(f"{self.uri}/{path}", stored)
        return stored.tag

    def swap(self, path: str, data: bytes, expected: str | None) -> str:
        """Put with `If-Match`; the ETag without its quotes is the second try."""
        # Some servers compare an ETag without its quotes, and refuse the right one with them.
        tags = [expected] if expected is None else [expected, expected.strip('"')]
        for tag in tags:
            try:
                stored = self._put(path, data, **({"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}))
            except NotFound as error:
                raise Conflict(str(error)) from None
            if stored.data == data:
                return stored.tag
            if stored.tag != expected:
                raise Conflict(f"{self.uri}/{path}")
        raise s3_errors.wrong_precondition(f"{self.uri}/{path}", expected)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Page through the keys."""
        start = len(self._key(""))
        with self._errors("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._below(prefix)
            )
            # A key that ends with / is the empty object that a console makes for a folder, and no file.
            entries = [
                Entry(item["Key"][start:], item["Size"], item["ETag"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")
            ]

        return iter(sorted(entries, key=lambda entry: entry.path))

    def children(self, prefix: str) -> Iterator[str]:
        """Let the server group the keys by folder, so that it does not send every key."""
        below = self._below(prefix)
        names: set[str] = set()
        with self._errors("list", prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=below, Delimiter="/"):
                names.update(item["Key"][len(below) :] for item in page.get("Contents", ()))
                names.update(item["Prefix"][len(below) : -1] for item in page.get("CommonPrefixes", ()))

        # Without the empty name, which is the object that a console makes for the folder itself.
        return iter(sorted(filter(is_valid_path, names)))

    def upload(self, folder: Path, prefix: str, paths: Iterable[str]) -> None:
        """Send each file with a checksum that the server compares; an error aborts the multipart uploads."""
        with disk_errors(folder), self._transfers("upload", prefix) as (manager, started):
            for path in paths:
                key = self._key(join_path(prefix, path))
                file = str(folder / path)
                started.append((path, manager.upload(file, self._bucket, key, extra_args=self._upload_checksum())))

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Download each file under a temporary name, then rename it; s3transfer does both."""
        with disk_errors(folder), self._transfers("download", prefix) as (manager, started):
            for path in paths:
                key = self._key(join_path(prefix, path))
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                started.append((path, manager.download(self._bucket, key, str(folder / path))))

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copy on the server, big files in parts."""
        # Nothing travels, so larger parts save requests.
        with self._transfers("copy", "", part_bytes=COPIED_PARTS * self._part_bytes) as (manager, started):
            for source, target in pairs:
                key = self._key(validate_path(target))
                started.append((source, manager.copy(self._at(source), self._bucket, key)))

    def delete(self, paths: Iterable[str]) -> None:
        """Send the keys in batches."""
        keys = [{"Key": self._key(validate_path(path))} for path in paths]

        for start in range(0, len(keys), DELETE_BATCH_SIZE):
            batch = {"Objects": keys[start : start + DELETE_BATCH_SIZE], "Quiet": True}
            with self._errors("delete"):
                failed = self.client.delete_objects(Bucket=self._bucket, Delete=batch).get("Errors", ())
                # The request succeeds as a whole even where some of its deletes fail.
                for error in failed:
                    where = f"cannot delete s3://{self._bucket}/{error['Key']}"
                    raise s3_errors.to_problem(where, error["Code"], error.get("Message", ""), 200, "DeleteObjects")

    def probe(self) -> None:
        """Expect 412 twice: some servers that speak S3 ignore both conditions and overwrite."""
        probe(self)

    def _put(self, path: str, data: bytes, **condition: str) -> Document:
        """Put under a condition and return the document that is there now: ours, or the one that was in the way.

        Raises:
            NotFound: If a document was expected and there is none.
            TryAgain: If the server was busy in every round.
        """
        from botocore.exceptions import ClientError

        # 409 (another writer is at this key) and 503 (the server is busy) pass, so each round waits a little longer.
        for round_number in range(MAX_ROUNDS):
            if round_number:
                time.sleep(random.uniform(0.5, 1) * PAUSE_SECONDS * 2**round_number)  # noqa: S311 - jitter, no secret
            with self._errors("write", path):
                try:
                    return Document(data, self.client.put_object(**self._at(path), Body=data, **condition)["ETag"])
                except ClientError as error:
                    code = error.response["Error"]["Code"]
                    # NoSuchKey: how S3 answers `If-Match` where there is no document at all.
                    if code in ("NoSuchKey", "PreconditionFailed", "412"):
                        try:
                            return self.read(path)
                        except NotFound:
                            # What was in the way is removed by now. A new document can be written in the next round;
                            # a document that was expected is gone.
                            if "IfMatch" in condition:
                                raise
                    elif s3_errors.http_status(error) not in (409, 503):
                        raise
        raise TryAgain(
            f"{self.uri}/{path}: the server was busy with this key {MAX_ROUNDS} times; run the same command again",
            cause=Cause.THROTTLED,
        )

    def _upload_checksum(self) -> dict[str, str]:
        # An algorithm that is named here would override AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
        if self.client.meta.config.request_checksum_calculation == "when_required":
            return {}
        # CRC32: boto3 can compute it without its C runtime, and S3 can check it for files in parts.
        return {"ChecksumAlgorithm": "CRC32"}

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _below(self, prefix: str) -> str:
        return self._key(f"{validate_path(prefix)}/" if prefix else "")

    def _at(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(validate_path(path))}

    @contextlib.contextmanager
    def _transfers(
        self, verb: str, prefix: str, *, part_bytes: int | None = None
    ) -> Iterator[tuple[Any, builtins.list[tuple[str, Any]]]]:
        """Yield a transfer manager and a list for the transfers that the block starts.

        After the block this waits for each of them. On an error the manager cancels them.
        """
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=part_bytes or self._part_bytes,
            multipart_chunksize=part_bytes or self._part_bytes,
            max_concurrency=MAX_CONCURRENCY,
            # boto3 takes its C runtime (CRT) on some machines, and that client cannot copy.
            preferred_transfer_client="classic",
        )
        started: builtins.list[tuple[str, Any]] = []
        with create_transfer_manager(self.client, config) as manager:
            yield manager, started

            # An error shows only in the result of its transfer.
            for path, future in started:
                with self._errors(verb, f"{prefix}/{path}" if prefix else path):
                    future.result()

    def _errors(self, verb: str, path: str = "") -> contextlib.AbstractContextManager[None]:
        return s3_errors.translate_errors(f"cannot {verb} {self.uri}/{path}".rstrip("/"), self._no_bucket)

    def _no_bucket(self) -> bool:
        """Return whether the bucket itself is missing."""
        from botocore.exceptions import BotoCoreError, ClientError

        # Any other answer (403, say), and none, leave it open; then the first error stands.
        try:
            self.client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            return s3_errors.http_status(error) == 404
        except BotoCoreError:
            return False
        return False
