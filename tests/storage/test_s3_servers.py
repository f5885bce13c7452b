"""S3 servers that are not quite like Amazon's: of ETags, of ranges, and of answers that break off."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import EndpointConnectionError
from urllib3.exceptions import ProtocolError

from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage import s3, s3_ranges
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import Conflict, NotFound

Answer = Callable[[Any], AWSResponse | None]


@pytest.fixture
def store(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(s3, "PAUSE_SECONDS", 0)
    return S3Store(s3_uri)


class Body(io.BytesIO):
    """The body of an answer; it may break off after its last byte."""

    def __init__(self, data: bytes, *, breaks_off: bool = False) -> None:
        super().__init__(data)
        self.breaks_off = breaks_off

    def read(self, size: int | None = -1, **_: object) -> bytes:
        data = super().read(-1 if size is None else size)
        if self.breaks_off and self.tell() == len(self.getvalue()):
            raise ProtocolError("Connection broken")
        return data

    def stream(self, *_: object, **__: object) -> list[bytes]:
        return [self.read()]


def answer(status: int, body: Body, **headers: str) -> AWSResponse:
    return AWSResponse("http://made.up", status, {name.replace("_", "-"): v for name, v in headers.items()}, body)


def refusal(status: int, code: str, message: str = "made up") -> AWSResponse:
    return answer(status, Body(f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()))


def on(store: S3Store, operation: str, handler: Answer) -> list[Any]:
    """Let a function answer an operation's requests, or leave them to the server; return the list of the requests."""
    requests: list[Any] = []

    def handle(request: Any, **_: object) -> AWSResponse | None:
        requests.append(request)
        return handler(request)

    store.client.meta.events.register_first(f"before-send.s3.{operation}", handle)
    return requests


def if_match(request: Any) -> str:
    value = request.headers.get("If-Match", "")
    return value.decode() if isinstance(value, bytes) else str(value)


def test_an_etag_without_quotes_is_tried_where_the_right_one_is_refused(store: S3Store) -> None:
    # As Ceph RGW 16.2 does.
    def answers_412(request: Any) -> AWSResponse | None:
        return refusal(412, "PreconditionFailed") if if_match(request).startswith('"') else None

    tag = store.write_if_absent("a", b"old")
    requests = on(store, "PutObject", answers_412)
    store.swap("a", b"new", tag)
    assert store.read("a").data == b"new"
    assert [if_match(request) for request in requests] == [tag, tag.strip('"')]
    store.probe()


def test_a_server_that_refuses_the_right_etag_is_refused_with_the_reason(store: S3Store) -> None:
    tag = store.write_if_absent("a", b"old")
    on(store, "PutObject", lambda request: refusal(412, "PreconditionFailed") if if_match(request) else None)
    for write in (lambda: store.swap("a", b"new", tag), store.probe):
        with pytest.raises(UsageError, match="answers 412 to a write under the condition that the ETag is"):
            write()
    # A document that really is another one is no such fault.
    with pytest.raises(Conflict):
        store.swap("a", b"new", '"0123"')


def test_a_probe_that_cannot_clean_up_says_what_it_found_all_the_same(store: S3Store) -> None:
    def strip(request: Any, **_: object) -> None:
        del request.headers["If-None-Match"]

    store.client.meta.events.register("before-sign.s3.PutObject", strip)
    on(store, "DeleteObjects", lambda _: refusal(403, "AccessDenied"))
    with pytest.raises(UsageError, match="ignores conditional writes"):
        store.probe()


def test_a_server_that_redirects_every_request_is_named_with_the_region(store: S3Store) -> None:
    def redirect(request: Any, **_: object) -> AWSResponse:
        return answer(301, Body(b""))

    store.client.meta.events.register_first("before-send.s3", redirect)
    for attempt in (lambda: store.read("a"), lambda: list(store.children("models")), store.probe):
        with pytest.raises(UsageError, match=r"redirects.* set AWS_REGION"):
            attempt()


def test_a_range_whose_answer_breaks_off_is_read_again(store: S3Store) -> None:
    store.write_if_absent("a", bytes(range(100)))
    broken = [True, True]

    def breaks_off(request: Any) -> AWSResponse | None:
        if not broken:
            return None
        broken.pop()
        body = Body(bytes(range(10, 15)), breaks_off=True)
        return answer(206, body, Content_Length="20", Content_Range="bytes 10-29/100", ETag='"x"')

    requests = on(store, "GetObject", breaks_off)
    assert store.read_range("a", 10, 20) == bytes(range(10, 30))
    assert len(requests) == 3

    broken.extend([True] * s3_ranges.MAX_ROUNDS)
    with pytest.raises(TryAgain):
        store.read_range("a", 10, 20)


def test_an_answer_that_ends_too_early_is_not_the_end_of_the_object(store: S3Store) -> None:
    """A connection that is closed shows as a read of fewer bytes, and as an error only in the next one."""
    data = bytes(range(100))
    store.write_if_absent("a", data)
    is_cut = [True]

    def cut(request: Any) -> AWSResponse | None:
        if not is_cut:
            return None
        is_cut.pop()
        return answer(206, Body(data[10:15]), Content_Length="20", Content_Range="bytes 10-29/100", ETag='"x"')

    requests = on(store, "GetObject", cut)
    assert store.read_range("a", 10, 20) == data[10:30]
    assert len(requests) == 2

    is_cut.append(True)
    with pytest.raises(TryAgain, match="run the same command again"):
        store.read("a")
    assert store.read("a").data == data


def test_a_range_that_is_another_ones_is_refused(store: S3Store) -> None:
    on(store, "GetObject", lambda _: answer(206, Body(bytes(20)), Content_Range="bytes 0-19/100", ETag='"x"'))
    assert store.read_range("a", 0, 20) == bytes(20)
    with pytest.raises(TryAgain, match=r"/a: expected an answer with the bytes from 20 on, found one with bytes 0-19"):
        store.read_range("a", 20, 20)


@pytest.mark.parametrize("size_bytes", [0, 99, 100, 101, 400, 500, 1234])
def test_an_object_is_hashed_in_ranges_wherever_it_ends(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    monkeypatch.setattr(s3_ranges, "HASHED_BYTES", 100)
    data = random.Random(size_bytes).randbytes(size_bytes)
    store.write_if_absent("a", data)
    requests = on(store, "GetObject", lambda _: None)
    assert store.sha256("a") == hashlib.sha256(data).hexdigest()
    # A small object takes one request, and what is asked for behind the end of a large one is bounded.
    assert size_bytes // 100 + 1 <= len(requests) <= size_bytes // 100 + (1 if size_bytes < 100 else 5)


def test_an_object_that_breaks_off_while_it_is_hashed_is_read_on(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_ranges, "HASHED_BYTES", 100)
    data = random.Random(0).randbytes(1000)
    store.write_if_absent("a", data)
    remaining = [1]

    def breaks_off(request: Any) -> AWSResponse | None:
        if "bytes=300-" not in str(request.headers["Range"]) or not remaining:
            return None
        remaining.pop()
        return answer(206, Body(data[300:333], breaks_off=True), Content_Range="bytes 300-399/1000", ETag='"x"')

    on(store, "GetObject", breaks_off)
    assert store.sha256("a") == hashlib.sha256(data).hexdigest()
    assert not remaining


def test_a_range_that_the_server_ignores_is_cut_out_of_the_whole(store: S3Store) -> None:
    data = bytes(range(100))
    on(store, "GetObject", lambda _: answer(200, Body(data), Content_Length="100", ETag='"x"'))
    assert store.read_range("a", 10, 20) == data[10:30]
    assert store.read_range("a", 90, 20) == data[90:]
    assert store.read_range("a", 100, 20) == b""


def test_the_page_of_a_proxy_is_no_document(store: S3Store) -> None:
    on(store, "GetObject", lambda _: answer(200, Body(b"<html>Log in</html>"), Content_Type="text/html"))
    on(store, "PutObject", lambda _: answer(200, Body(b"<html>Log in</html>"), Content_Type="text/html"))
    for call in (lambda: store.read("a"), lambda: store.write_if_absent("a", b"x")):
        with pytest.raises(TryAgain, match=r"found one without ETag.*AWS_ENDPOINT_URL"):
            call()


@pytest.mark.parametrize(
    ("code", "remedy"), [("ExpiredToken", "get new ones"), ("RequestTimeTooSkewed", "the clock of this machine")]
)
def test_a_refusal_that_no_permission_cures_asks_for_none(store: S3Store, code: str, remedy: str) -> None:
    on(store, "GetObject", lambda _: refusal(403, code))
    with pytest.raises(UsageError, match=remedy) as caught:
        store.read("a")
    assert "permission" not in str(caught.value)


def test_a_refusal_names_the_permission_that_is_missing(store: S3Store) -> None:
    text = ["made up"]
    store.client.meta.events.register_first("before-send.s3", lambda **_: refusal(403, "AccessDenied", text[0]))
    calls: dict[str, Callable[[], object]] = {
        "s3:GetObject": lambda: store.read_range("f", 0, 1),
        "s3:PutObject": lambda: store.write_if_absent("f", b"y"),
        "s3:ListBucket": lambda: store.list("f"),
        "s3:DeleteObject": lambda: store.delete(["f"]),
    }
    for action, call in calls.items():
        with pytest.raises(UsageError, match=f"the permission {action}"):
            call()
    text[0] = "User: x is not authorized to perform: kms:Decrypt on the resource"
    with pytest.raises(UsageError, match="give this role the permission kms:Decrypt"):
        store.read("f")


def test_a_list_that_is_not_there_is_no_missing_file(store: S3Store) -> None:
    on(store, "ListObjectsV2", lambda _: refusal(404, "NoSuchKey"))
    for call in (lambda: store.list("models"), lambda: store.children("models")):
        with pytest.raises(UsageError, match=r"no answer of S3 to a list.*AWS_ENDPOINT_URL"):
            call()


def test_a_copy_under_a_condition_that_is_never_fulfilled_is_not_tried_again(store: S3Store) -> None:
    store.write_if_absent("a", b"x")
    on(store, "CopyObject", lambda _: refusal(412, "PreconditionFailed"))
    with pytest.raises(UsageError, match=r"a copy is refused .* use another server"):
        store.copy([("a", "b")])


def test_a_server_that_goes_away_leaves_the_first_error(store: S3Store) -> None:
    def is_away(request: Any) -> AWSResponse:
        raise EndpointConnectionError(endpoint_url="http://made.up")

    on(store, "HeadObject", lambda _: answer(404, Body(b"")))
    on(store, "HeadBucket", is_away)
    with pytest.raises(NotFound):
        store.copy([("a", "b")])


def test_an_error_without_a_text_is_printed_without_one(store: S3Store) -> None:
    # As Ceph sends most of its errors.
    on(store, "GetObject", lambda _: refusal(403, "AccessDenied", ""))
    with pytest.raises(UsageError, match="AccessDenied; give this role") as caught:
        store.read("a")
    assert "None" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded"), (507, "XMinioStorageFull")],
)
def test_a_full_store_asks_for_room_and_not_for_a_permission(store: S3Store, status: int, code: str) -> None:
    on(store, "PutObject", lambda _: refusal(status, code, ""))
    with pytest.raises(TryAgain, match=rf"{code}; the store is full: make room") as caught:
        store.write_if_absent("a", b"x")
    assert caught.value.cause == Cause.DISK_FULL


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (411, "MissingContentLength", ""),  # Ceph 16 over TLS
        (400, "InvalidRequest", "Missing required header for this request: Content-MD5"),  # Swift
    ],
)
def test_a_server_that_does_not_take_the_checksums_asks_for_the_setting(
    store: S3Store, status: int, code: str, message: str
) -> None:
    for operation in ("PutObject", "DeleteObjects"):
        on(store, operation, lambda _: refusal(status, code, message))
    for call in (lambda: store.write_if_absent("a", b"x"), lambda: store.delete(["a"])):
        with pytest.raises(UsageError, match=f"{code}.*AWS_REQUEST_CHECKSUM_CALCULATION to when_required"):
            call()


def test_a_bucket_whose_versions_take_its_conditions_away_is_refused_with_the_reason(store: S3Store) -> None:
    """A Ceph 16 overwrites under If-None-Match where the bucket has versions, and takes no ETag for the right one."""
    tag = store.write_if_absent("a", b"old")

    def has_versions(request: Any) -> AWSResponse | None:
        if if_match(request):
            return refusal(412, "PreconditionFailed", "")
        return answer(200, Body(b""), ETag='"of this request"')

    on(store, "PutObject", has_versions)
    for write in (store.probe, lambda: store.swap("a", b"new", tag)):
        with pytest.raises(UsageError, match=r"Ceph 16 does so only in a bucket that never had versioning"):
            write()
