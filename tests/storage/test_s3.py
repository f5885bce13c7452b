"""Faults of an S3 server: lost answers, throttling, refusals, conditions that it ignores."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import boto3.exceptions
import boto3.session
import botocore.exceptions
import botocore.parsers
import pytest
import s3transfer.exceptions
from botocore.awsrequest import AWSResponse

from qlora_retrain.core.errors import Problem, TryAgain, UsageError
from qlora_retrain.storage import s3
from qlora_retrain.storage.s3 import MIB, S3Store
from qlora_retrain.storage.store import AlreadyExists, Conflict, NotFound
from tests.storage.faulty_server import Raw, answer

PUT = "before-send.s3.PutObject"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(s3, "PAUSE_SECONDS", 0)


@pytest.fixture
def store(s3_uri: str) -> S3Store:
    return S3Store(s3_uri, part_bytes=5 * MIB)


def fail(store: S3Store, event: str, *answers: Any, last_for_ever: bool = False) -> list[str]:
    """Give these answers to the next requests and return the list of the requests' URLs, which grows with them.

    An answer that is an exception is raised, and one that is callable is called.
    """
    remaining = list(answers)
    urls: list[str] = []

    def handler(request: Any, **_: object) -> AWSResponse | None:
        urls.append(request.url)
        if not remaining:
            return None
        answer = remaining[0] if last_for_ever and len(remaining) == 1 else remaining.pop(0)
        if isinstance(answer, Exception):
            raise answer
        result: AWSResponse | None = answer() if callable(answer) else answer
        return result

    store.client.meta.events.register_first(event, handler)
    return urls


def behind(store: S3Store, path: str, data: bytes) -> None:
    """Write through another client, as a request whose answer is lost or another process does."""
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket=store._bucket, Key=store._key(path), Body=data)
    client.close()


def lost(store: S3Store, path: str, data: bytes, then: Exception | AWSResponse) -> Callable[[], AWSResponse]:
    def do() -> AWSResponse:
        behind(store, path, data)
        if isinstance(then, Exception):
            raise then
        return then

    return do


DROPPED = botocore.exceptions.ConnectionClosedError(endpoint_url="http://made.up")


@pytest.mark.parametrize("then", [DROPPED, answer(500, "InternalError")])
def test_a_write_whose_answer_is_lost_succeeds(store: S3Store, then: Exception | AWSResponse) -> None:
    urls = fail(store, PUT, lost(store, "a", b"mine", then))
    tag = store.write_if_absent("a", b"mine")
    assert len(urls) == 2
    assert tag == store.read("a").tag


@pytest.mark.parametrize("then", [DROPPED, answer(503, "SlowDown")])
@pytest.mark.parametrize("exists", [True, False])
def test_a_swap_whose_answer_is_lost_succeeds(store: S3Store, then: Exception | AWSResponse, exists: bool) -> None:
    expected = store.write_if_absent("a", b"old") if exists else None
    fail(store, PUT, lost(store, "a", b"mine", then))
    assert store.swap("a", b"mine", expected) == store.read("a").tag


def test_a_write_that_another_overtakes_while_its_answer_is_lost_sees_the_others(store: S3Store) -> None:
    fail(store, PUT, lost(store, "a", b"theirs", DROPPED))
    with pytest.raises(AlreadyExists) as caught:
        store.write_if_absent("a", b"mine")
    assert caught.value.stored.data == b"theirs"


@pytest.mark.parametrize("busy", [answer(503, "SlowDown"), answer(409, "ConditionalRequestConflict")])
def test_a_busy_server_is_asked_again(store: S3Store, busy: AWSResponse) -> None:
    urls = fail(store, PUT, busy, busy)
    tag = store.write_if_absent("a", b"x")
    assert len(urls) == 3
    fail(store, PUT, busy, busy)
    store.swap("a", b"y", tag)
    assert store.read("a").data == b"y"


def test_a_503_outlasts_boto3_but_not_the_loop_around_it(store: S3Store) -> None:
    # boto3 gives up after 8 attempts of its own.
    urls = fail(store, PUT, *[answer(503, "SlowDown")] * 12)
    store.write_if_absent("a", b"x")
    assert len(urls) == 13


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (409, "ConditionalRequestConflict")])
def test_a_server_that_stays_busy_means_try_again(store: S3Store, status: int, code: str) -> None:
    fail(store, PUT, answer(status, code), last_for_ever=True)
    with pytest.raises(TryAgain, match=f"{store.uri}/a: the server was busy with this key {s3.MAX_ROUNDS} times"):
        store.write_if_absent("a", b"x")


def test_a_document_that_is_removed_between_the_412_and_the_read_is_written_again(store: S3Store) -> None:
    fail(store, PUT, answer(412, "PreconditionFailed"))
    store.write_if_absent("a", b"x")
    assert store.read("a").data == b"x"
    fail(store, PUT, answer(412, "PreconditionFailed"))
    with pytest.raises(Conflict):
        store.swap("b", b"x", '"0123"')


def test_a_server_that_ignores_conditions_is_refused_by_the_probe(store: S3Store) -> None:
    # The header is removed on its way, as a server would overlook it.
    def strip(name: str) -> None:
        def handler(request: Any, **_: object) -> None:
            del request.headers[name]

        store.client.meta.events.register("before-sign.s3.PutObject", handler, unique_id=name)

    for name in ("If-None-Match", "If-Match"):
        strip(name)
        with pytest.raises(UsageError, match="ignores conditional writes"):
            store.probe()
        store.client.meta.events.unregister("before-sign.s3.PutObject", unique_id=name)
    assert list(store.children("")) == []


def test_a_server_without_conditions_is_refused_by_the_probe(store: S3Store) -> None:
    fail(store, PUT, answer(501, "NotImplemented"))
    with pytest.raises(UsageError, match="lacks a request that a store needs"):
        store.probe()


def test_a_big_file_goes_in_parts(store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "COPIED_PARTS", 1)
    # Three parts of 5 MiB, the smallest that S3 allows; the last one is shorter.
    data = os.urandom(12 * MIB)
    (tmp_path / "big").write_bytes(data)
    urls = fail(store, "before-send.s3.UploadPart")
    copied = fail(store, "before-send.s3.UploadPartCopy")
    store.upload(tmp_path, "", ["big"])
    store.copy([("big", "copy")])

    assert (len(urls), len(copied)) == (3, 3)
    for path in ("big", "copy"):
        assert store.sha256(path) == hashlib.sha256(data).hexdigest()
    store.download("", ["copy"], tmp_path)
    assert (tmp_path / "copy").read_bytes() == data


def test_an_upload_that_fails_is_aborted(store: S3Store, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(12 * MIB))
    fail(store, "before-send.s3.UploadPart", None, answer(403, "AccessDenied"))
    aborted = fail(store, "before-send.s3.AbortMultipartUpload")

    with pytest.raises(UsageError, match=r"cannot upload .*/a/big: AccessDenied"):
        store.upload(tmp_path, "a", ["big"])
    assert len(aborted) == 1
    assert list(store.list("")) == []
    # The tests share a bucket, and those of interruptions leave uploads there.
    uploads = store.client.list_multipart_uploads(Bucket=store._bucket).get("Uploads", [])
    assert not [upload for upload in uploads if f"{store.uri}/a/big".endswith(upload["Key"])]


def test_a_download_to_a_full_disk_leaves_nothing(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.write_if_absent("a/f", b"x")
    monkeypatch.setattr("s3transfer.download.IOWriteTask._main", full)
    with pytest.raises(TryAgain, match="the disk is full"):
        store.download("a", ["f"], tmp_path / "down")
    assert list((tmp_path / "down").iterdir()) == []


def test_more_than_one_page_is_listed_and_more_than_one_batch_deleted(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two keys per page and per batch, so that six files need several of both.
    def small_pages(params: dict[str, Any], **_: object) -> None:
        params["MaxKeys"] = 2

    store.client.meta.events.register("provide-client-params.s3.ListObjectsV2", small_pages)
    monkeypatch.setattr(s3, "DELETE_BATCH_SIZE", 2)
    listed, deleted = fail(store, "before-send.s3.ListObjectsV2"), fail(store, "before-send.s3.DeleteObjects")
    for path in ("e", "d/2", "d/1", "c", "b", "a"):
        store.write_if_absent(path, b".")
    assert [e.path for e in store.list("")] == ["a", "b", "c", "d/1", "d/2", "e"]
    assert len(listed) == 3
    assert list(store.children("")) == ["a", "b", "c", "d", "e"]
    store.delete(e.path for e in store.list(""))
    assert len(deleted) == 3
    assert list(store.list("")) == []


def test_a_consoles_folder_marker_is_not_a_file(store: S3Store) -> None:
    behind(store, "folder/", b"")
    store.write_if_absent("folder/f", b"x")
    assert [e.path for e in store.list("")] == ["folder/f"]
    assert list(store.children("folder")) == ["f"]


def test_a_delete_that_is_refused_for_one_file_is_refused(store: S3Store) -> None:
    body = b"<DeleteResult><Error><Key>k</Key><Code>%s</Code><Message>made up</Message></Error></DeleteResult>"
    for code, expected in ((b"AccessDenied", UsageError), (b"InternalError", TryAgain)):
        fail(store, "before-send.s3.DeleteObjects", AWSResponse("http://made.up", 200, {}, Raw(body % code)))
        with pytest.raises(expected, match=f"/k: {code.decode()}"):
            store.delete(["a"])


def calls(store: S3Store, folder: Path) -> dict[str, Callable[[], object]]:
    (folder / "f").write_bytes(b"x")
    return {
        "read": lambda: store.read("f"),
        "write": lambda: store.write_if_absent("f", b"y"),
        "swap": lambda: store.swap("f", b"y", '"0123"'),
        "list": lambda: store.list("f"),
        "children": lambda: store.children("f"),
        "upload": lambda: store.upload(folder, "", ["f"]),
        "download": lambda: store.download("", ["f"], folder / "down"),
        "copy": lambda: store.copy([("f", "g")]),
        "delete": lambda: store.delete(["f"]),
        "probe": store.probe,
    }


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", UsageError),
        (403, "InvalidAccessKeyId", UsageError),
        (404, "NoSuchBucket", UsageError),
        (400, "AuthorizationHeaderMalformed", UsageError),
        (400, "RequestTimeout", TryAgain),
        (429, "TooManyRequests", TryAgain),
        (500, "InternalError", TryAgain),
        (503, "SlowDown", TryAgain),
    ],
)
def test_every_call_translates_the_servers_errors(
    store: S3Store, tmp_path: Path, status: int, code: str, expected: type[Problem]
) -> None:
    store.write_if_absent("f", b"x")
    fail(store, "before-send.s3", answer(status, code), last_for_ever=True)
    for name, call in calls(store, tmp_path).items():
        with pytest.raises(expected, match=r"s3://retraining/team a/\w+") as caught:
            call()
        assert type(caught.value) is expected, name


def test_a_missing_bucket_is_named_by_every_call(s3_server: str, tmp_path: Path) -> None:
    for call in calls(S3Store("s3://no-such-bucket/root"), tmp_path).values():
        with pytest.raises(UsageError, match=r"s3://no-such-bucket/root.*create the bucket"):
            call()


def test_a_missing_file_is_not_a_missing_bucket(store: S3Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.download("", ["f"], tmp_path)
    with pytest.raises(NotFound):
        store.copy([("f", "g")])


def test_a_server_that_is_not_there_means_try_again(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for call in calls(S3Store("s3://bucket/root"), tmp_path).values():
        with pytest.raises(TryAgain, match="Could not connect"):
            call()


def test_missing_credentials_and_a_bad_endpoint_are_usage_errors(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "no url")
        with pytest.raises(UsageError, match="Invalid endpoint"):
            S3Store("s3://bucket/root")
        patch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(UsageError, match="nobody"):
            S3Store("s3://bucket/root")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for call in calls(S3Store("s3://bucket/root"), tmp_path).values():
        with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
            call()


def subclasses(cls: type[Exception]) -> set[type[Exception]]:
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def test_no_exception_of_boto3_passes_through(s3_uri: str) -> None:
    bases = [botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error, botocore.parsers.ResponseParserError]
    classes = set().union(*(subclasses(base) for base in bases))
    transfers = [c for c in vars(s3transfer.exceptions).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) > 80
    store = S3Store(s3_uri)
    # This event is before boto3's retries, so the exception that is raised here is the one that comes out.
    event = "before-parameter-build.s3.GetObject"
    for cls in sorted(classes | set(transfers), key=lambda c: c.__name__):
        if cls.__module__.split(".")[0] not in ("boto3", "botocore", "s3transfer", "concurrent"):
            continue
        # These come only from a bug in our own code.
        if cls.__name__ in ("InvalidSubscriberMethodError", "TransferNotDoneError"):
            continue
        error = cls.__new__(cls)

        def handler(error: Exception = error, **_: object) -> NoReturn:
            raise error

        store.client.meta.events.register_first(event, handler, unique_id="x")
        with pytest.raises(Problem):
            store.read("a")
        store.client.meta.events.unregister(event, unique_id="x")
