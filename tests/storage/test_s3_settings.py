"""What a person sets for boto3 is heeded by every request of the store; judged by the requests themselves."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.storage import audit, s3
from qlora_retrain.storage.s3 import MIB, S3Store

Request = tuple[str, dict[str, str]]


@pytest.fixture
def requests_of(s3_uri: str, tmp_path: Path) -> Callable[[], list[Request]]:
    """Use every operation of a new store once; the requests it sent, as operation and headers in small letters."""

    def use() -> list[Request]:
        store, requests = S3Store(s3_uri, part_bytes=5 * MIB), []

        def handler(request: Any, event_name: str, **_: object) -> None:
            headers = {name.lower(): str(value) for name, value in request.headers.items()}
            requests.append((event_name.rpartition(".")[2], headers))

        store.client.meta.events.register_first("before-send.s3", handler)
        (tmp_path / "small").write_bytes(b"small")
        (tmp_path / "large").write_bytes(bytes(21 * MIB))
        tag = store.write_if_absent("document", b"first")
        store.swap("document", b"second", tag)
        store.upload(tmp_path, "up", ["small", "large"])
        assert store.read_start("up/small", 3) == b"sma"
        store.copy([("up/small", "copy/small"), ("up/large", "copy/large")])
        store.download("copy", ["small", "large"], tmp_path / "down")
        assert (tmp_path / "down" / "large").read_bytes() == bytes(21 * MIB)
        assert store.read("document").data == b"second"
        assert len(list(store.list(""))) == 5
        store.delete(["document"])
        return requests

    return use


def checksum_headers(request: Request) -> list[str]:
    """The headers of a request that have to do with a checksum of its body, or ask for one of the answer's."""
    name, headers = request
    signs = ("x-amz-checksum-", "x-amz-sdk-checksum", "x-amz-trailer")
    return [f"{name}: {header}" for header in headers if header.startswith(signs)] + [
        f"{name}: aws-chunked" for _ in range("aws-chunked" in headers.get("content-encoding", ""))
    ]


def test_checksums_are_sent_and_asked_for_by_default(requests_of: Callable[[], list[Request]]) -> None:
    requests = requests_of()
    with_checksum = {name for name, _ in filter(checksum_headers, requests)}
    assert {"PutObject", "UploadPart", "CreateMultipartUpload", "GetObject"} <= with_checksum


def test_checksums_are_left_out_where_the_environment_says_so(
    requests_of: Callable[[], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for an older server that speaks S3, which refuses the new headers.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    requests = requests_of()
    assert {"PutObject", "UploadPart", "CreateMultipartUpload", "UploadPartCopy", "CopyObject", "GetObject"} <= {
        name for name, _ in requests
    }
    assert [header for request in requests for header in checksum_headers(request)] == []
    # S3 requires one where many objects are deleted in one request, and older servers only know this one.
    assert [name for name, headers in requests if "content-md5" in headers] == ["DeleteObjects"]


def test_they_are_left_out_where_the_config_file_says_so(
    requests_of: Callable[[], list[Request]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_required\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    puts = [request for request in requests_of() if request[0] in ("PutObject", "UploadPart", "CreateMultipartUpload")]
    assert [header for request in puts for header in checksum_headers(request)] == []


@pytest.mark.parametrize(("setting", "attempts"), [(None, 8), ("2", 2), ("1", 1), ("11", 11)])
def test_a_request_is_tried_as_often_as_the_environment_says(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, setting: str | None, attempts: int
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    if setting:
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", setting)
    store = S3Store(s3_uri)
    urls = []

    def handler(request: Any, **_: object) -> AWSResponse:
        urls.append(request.url)
        return AWSResponse(request.url, 500, {}, Body())

    store.client.meta.events.register_first("before-send.s3.GetObject", handler)
    with pytest.raises(Problem):
        store.read("a")
    assert len(urls) == attempts


class Body:
    """The body of an answer made up by a test."""

    def stream(self, *_: object, **__: object) -> list[bytes]:
        return [b"<Error><Code>InternalError</Code></Error>"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_RETRY_MODE", "never"),
        ("AWS_ENDPOINT_URL", "no url"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "sometimes"),
        ("AWS_DEFAULTS_MODE", "fast"),
    ],
)
def test_a_setting_that_boto3_does_not_know_is_a_usage_error(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError):
        S3Store(s3_uri)


@pytest.mark.parametrize(
    ("variables", "attribute", "expected"),
    [
        ({}, "connect_timeout", 10),
        ({"AWS_DEFAULTS_MODE": "in-region"}, "connect_timeout", 1.1),
        ({}, "max_pool_connections", s3.MAX_CONCURRENCY),
    ],
)
def test_the_clients_settings(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], attribute: str, expected: object
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert getattr(S3Store(s3_uri).client.meta.config, attribute) == expected


@pytest.mark.parametrize("mode", ["adaptive", "legacy"])
def test_the_mode_of_retrying_is_the_environments(s3_uri: str, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    assert S3Store(s3_uri).client.meta.config.retries == {"total_max_attempts": 8, "mode": "standard"}
    monkeypatch.setenv("AWS_RETRY_MODE", mode)
    assert S3Store(s3_uri).client.meta.config.retries["mode"] == mode


def test_the_endpoint_of_s3_alone_is_heeded(s3_uri: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    store = S3Store(s3_uri)
    store.write_if_absent("a", b"a")
    assert store.read("a").data == b"a"


def test_a_printed_command_names_the_store_as_a_shell_needs_it() -> None:
    store = S3Store("s3://bucket/team a")
    assert shlex.split(audit.repair_command(store, "intents"))[-2:] == ["--root", store.uri]
