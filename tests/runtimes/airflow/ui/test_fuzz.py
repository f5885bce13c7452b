"""Requests at random, made from what the application says of itself: no error of the server, and no way out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qlora_retrain.storage.registry import Release
from tests.runtimes.airflow.ui.conftest import ORIGIN

# The warnings are Airflow's own, while it starts.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PREFIX = "/qlora-retrain"
MARK = "7c1e-not-for-this-reader"
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
ODD = ["..", ".", "", "%2e%2e", "..%2f", "\\..\\", "\x00", "é", "\ud7ff", "a" * 400, "~", "*", "%", "models", "aliases"]


@pytest.fixture
def check(browser: Callable[..., Any], two_versions: tuple[Release, Release], tmp_path: Path) -> Callable[..., int]:
    """Send a request as a user who may read one line; refuse an error of the server, and what is not that user's."""
    (tmp_path / "secret.txt").write_text(MARK)
    for folder in ("store/runs/x", "store/models/secrets/versions/x", "store/artifacts/dataset/x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "report.html").write_text(MARK)
    clerk = browser("clerk")

    def send(method: str, url: str, **request: Any) -> int:
        answer = clerk.request(method, url, **request)
        assert answer.status_code < 500, answer.text
        assert MARK not in answer.text
        # No route of anybody matches a line break, so Airflow itself answers that nothing is there.
        is_ours = "\n" not in unquote(unquote(answer.request.url.path))
        assert not is_ours or "default-src 'none'" in answer.headers["content-security-policy"]
        return int(answer.status_code)

    return send


def test_requests_made_from_the_schema_are_answered(
    check: Callable[..., int], two_versions: tuple[Release, Release]
) -> None:
    from qlora_retrain.runtimes.airflow.ui.app import create_pages

    document = create_pages().openapi()
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) == len({(o.path, o.method) for o in operations}) == 8
    version = two_versions[1].version
    valid = {"line": "intents", "dag_id": "intents", "version": version, "report": "data", "a": version, "b": version}
    statuses: set[int] = set()

    for operation in operations:

        @settings(QUICK, max_examples=15)
        @given(case=operation.as_strategy(), valid_names=st.sets(st.sampled_from(sorted(valid)), min_size=2))
        def fuzz(case: Any, valid_names: set[str]) -> None:
            # With random names alone, nothing behind the first check would ever be reached.
            replaced = {name: valid[name] for name in valid_names}
            parts = {name: replaced.get(name, value) for name, value in (case.path_parameters or {}).items()}
            query = {name: replaced.get(name, value) for name, value in (case.query or {}).items()}
            path = case.operation.path
            for name, value in parts.items():
                path = path.replace(f"{{{name}}}", quote(str(value), safe=""))
            body = case.body if isinstance(case.body, dict) else {}
            request = {"data": body, "headers": {"Origin": ORIGIN}} if case.method == "POST" else {}
            statuses.add(check(case.method, PREFIX + path, params=query, **request))

        fuzz()
    assert {200, 403, 404} <= statuses


def test_no_path_leads_out_of_the_pages(
    airflow_app: Any, browser: Callable[..., Any], check: Callable[..., int]
) -> None:
    cookie = f"_token={browser('clerk').cookies['_token']}".encode()
    segment = st.sampled_from([*ODD, "intents", "runs", "reports", "data", "diff", "move"]) | st.text(max_size=12)

    async def send(method: str, path: str) -> tuple[int, bytes]:
        # Past every client, since those resolve `..` themselves.
        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(errors="replace"), "query_string": b"", "root_path": "",
            "headers": [(b"host", b"airflow.example"), (b"cookie", cookie)],
            "server": ("airflow.example", 80), "client": ("127.0.0.1", 1), "state": {},
        }  # fmt: skip
        await airflow_app(scope, receive, keep)
        return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])

    @settings(QUICK, max_examples=150)
    @given(parts=st.lists(segment, max_size=7), method=st.sampled_from(["GET", "GET", "GET", "POST", "PUT", "HEAD"]))
    def fuzz(parts: list[str], method: str) -> None:
        status, body = asyncio.run(send(method, "/".join([PREFIX, *parts])))
        assert status in (200, 303, 403, 404, 405, 413)
        assert MARK.encode() not in body

    fuzz()


def test_no_form_breaks_the_server(check: Callable[..., int]) -> None:
    @settings(QUICK, max_examples=60)
    @given(
        body=st.binary(max_size=200),
        kind=st.sampled_from(
            [
                "application/x-www-form-urlencoded",
                "multipart/form-data",
                "multipart/form-data; boundary=x",
                "text/plain",
            ]
        ),
        length=st.none() | st.text("0123456789- ", max_size=12),
    )
    def fuzz(body: bytes, kind: str, length: str | None) -> None:
        headers = {"Content-Type": kind, "Origin": ORIGIN}
        headers |= {} if length is None else {"Content-Length": length}
        status = check("POST", f"{PREFIX}/models/intents/move", content=body, headers=headers)
        assert status in (400, 403, 413, 422)

    fuzz()
