"""Submit and schedule runs against a fake KFP API over HTTP, which records requests and refuses what KFP would."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from qlora_retrain.core.errors import Exit

pytestmark = pytest.mark.kfp

V2 = "/apis/v2beta1"
TOKEN = "canary-kfp-token-51c0"
LINE = {
    "line": "support-intents",
    "description": "Sorts tickets.",
    "schedule": "0 3 * * 1",
    "sources": {"raw_data": "s3://data/tickets", "base_model": "hf://owner/model@" + "a" * 40},
    "train": {"rank": 8},
}
RunInKfp = Callable[..., subprocess.CompletedProcess[str]]


class FakeKfpApi(ThreadingHTTPServer):
    """The part of KFP's API that a submission needs: health, experiments, runs, recurring runs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self.recurring: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.multi_user = False
        self.namespaces: set[str | None] = set()
        self.failure: tuple[str, int] | None = None  # the end of a path, and the HTTP status to answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeKfpApi

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, document: object, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return body

    def fails_on_purpose(self, method: str, path: str) -> bool:
        self.server.requests.append((method, path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.failure and path.endswith(self.server.failure[0]):
            if method != "GET":
                self.body()
            self.answer({"error": "no"}, self.server.failure[1])
            return True
        return False

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if self.fails_on_purpose("GET", parts.path):
            return
        query = parse_qs(parts.query)
        if parts.path != f"{V2}/healthz":
            self.server.namespaces.add(query.get("namespace", [None])[0])
        if parts.path == f"{V2}/healthz":
            self.answer({"multi_user": self.server.multi_user})
        elif parts.path == f"{V2}/experiments":
            display_name = json.loads(query["filter"][0])["predicates"][0]["stringValue"]
            self.answer(
                {"experiments": [e for e in self.server.experiments.values() if e["display_name"] == display_name]}
            )
        # One per page, so that a client that reads only the first page fails the test.
        elif parts.path == f"{V2}/recurringruns":
            ids, at = list(self.server.recurring), int(query.get("page_token", ["0"])[0] or 0)
            page = [self.server.recurring[i] for i in ids[at : at + 1]]
            next_page = {"next_page_token": str(at + 1)} if at + 1 < len(ids) else {}
            self.answer({"recurringRuns": page, **next_page})
        else:
            self.answer({"error": f"unknown: {self.path}"}, 404)

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        if self.fails_on_purpose("POST", parts.path):
            return
        body = self.body()
        if parts.path == f"{V2}/experiments":
            resource = {**body, "experiment_id": f"e{len(self.server.experiments)}"}
            self.server.experiments[resource["experiment_id"]] = resource
        elif body.get("experiment_id") not in self.server.experiments:
            return self.answer({"error": "no such experiment"}, 400)
        elif parts.path == f"{V2}/runs":
            resource = {**body, "run_id": f"r{len(self.server.runs)}"}
            self.server.runs.append(resource)
        elif parts.path == f"{V2}/recurringruns":
            if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
                return self.answer({"error": "wanted six fields"}, 400)
            resource = {**body, "recurring_run_id": f"s{len(self.server.requests)}"}
            self.server.recurring[resource["recurring_run_id"]] = resource
        else:
            return self.answer({"error": f"unknown: {self.path}"}, 404)
        return self.answer(resource)

    def do_DELETE(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(("DELETE", path))
        deleted = self.server.recurring.pop(path.rpartition("/")[2], None)
        self.answer({} if deleted else {"error": "not there"}, 200 if deleted else 404)


@pytest.fixture
def api() -> Iterator[FakeKfpApi]:
    with FakeKfpApi() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def line(tmp_path: Path) -> Path:
    path = tmp_path / "line.yaml"
    path.write_text(yaml.safe_dump(LINE))
    return path


@pytest.fixture
def kfp(
    in_kfp: RunInKfp, api: FakeKfpApi, profile_file: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `qlora-retrain kfp VERB` against the fake API, with a token in a file."""
    token = tmp_path / "token"
    token.write_text(TOKEN)

    def run(verb: str, *arguments: object, endpoint: str = api.url) -> subprocess.CompletedProcess[str]:
        options = ["--endpoint", endpoint, "--profile", profile_file, "--root", "s3://models/retrain"]
        environment = {"KF_PIPELINES_SA_TOKEN_PATH": str(token), "HOME": str(tmp_path)}
        return in_kfp("-m", "qlora_retrain.cli", "kfp", verb, *options, *arguments, **environment)

    return run


def test_a_run_is_submitted_with_the_line_itself_and_the_compiled_pipeline(
    kfp: RunInKfp, api: FakeKfpApi, line: Path, compiled: Any
) -> None:
    completed = kfp("submit", line, "--set", "train.learning_rate=1e-4")
    assert completed.returncode == 0, completed.stderr
    (run,) = api.runs
    assert completed.stdout == f"run r0 of line support-intents: {api.url}/#/runs/details/r0\n"
    assert api.experiments[run["experiment_id"]]["display_name"] == "support-intents"
    assert run["display_name"].startswith("support-intents 20")
    sources = {name: {"uri": uri} for name, uri in LINE["sources"].items()}  # type: ignore[attr-defined]
    assert run["runtime_config"]["parameters"] == {
        "line": {**LINE, "sources": sources, "schedule": {"cron": "0 3 * * 1"}},
        "line_name": "support-intents",
        "root": "s3://models/retrain",
        "alias": "production",
        "resume_run": "",
        "overrides": ["train.learning_rate=1e-4"],
        "started_by": "hand",
    }

    submitted_spec = run["pipeline_spec"]
    assert submitted_spec["pipeline_spec"]["deploymentSpec"] == compiled.pipeline["deploymentSpec"]
    assert submitted_spec["platform_spec"] == compiled.platform
    assert api.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in completed.stdout + completed.stderr + json.dumps(run)


def test_a_schedule_takes_the_place_of_the_lines_earlier_ones_and_of_no_others(
    kfp: RunInKfp, api: FakeKfpApi, line: Path
) -> None:
    assert kfp("schedule", line).returncode == 0
    another_line = line.with_name("other.yaml")
    another_line.write_text(yaml.safe_dump({**LINE, "line": "refunds"}))
    assert kfp("schedule", another_line).returncode == 0
    (first, refunds) = api.recurring.values()
    assert first["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1", "six fields, seconds first"
    # A run that nobody asked for needs new rows, where the line says so.
    assert first["runtime_config"]["parameters"]["started_by"] == "schedule"
    assert (first["mode"], first["max_concurrency"], first["no_catchup"]) == ("ENABLE", 1, True)

    line.write_text(yaml.safe_dump({**LINE, "schedule": "30 4 * * *"}))
    again = kfp("schedule", line)
    assert again.returncode == 0, again.stderr
    assert "in place of 1 before" in again.stdout
    now = [(r["display_name"], r["trigger"]["cron_schedule"]["cron"]) for r in api.recurring.values()]
    assert now == [("refunds", "0 0 3 * * 1"), ("support-intents", "0 30 4 * * *")]
    assert refunds in api.recurring.values()

    writes = [method for method, _ in api.requests if method != "GET"]
    assert writes[-2:] == ["POST", "DELETE"], "the new one is there before the old one goes"
    removed = kfp("schedule", line, "--remove")
    assert "1 schedule removed" in removed.stdout
    assert [r["display_name"] for r in api.recurring.values()] == ["refunds"]


def test_a_namespace_is_named_where_kfp_serves_several_users_and_only_there(
    kfp: RunInKfp, api: FakeKfpApi, line: Path
) -> None:
    assert kfp("schedule", line, "--namespace", "team-a").returncode == 0
    assert api.namespaces == {None}

    api.multi_user = True
    api.namespaces.clear()
    api.experiments.clear()
    again = kfp("schedule", line, "--namespace", "team-a")
    assert again.returncode == 0, again.stderr
    assert api.namespaces == {"team-a"}
    assert [e["namespace"] for e in api.experiments.values()] == ["team-a"]


def test_a_schedule_that_cannot_be_made_leaves_the_old_one(kfp: RunInKfp, api: FakeKfpApi, line: Path) -> None:
    assert kfp("schedule", line).returncode == 0
    before = dict(api.recurring)
    api.failure = ("/recurringruns", 503)
    failed = kfp("schedule", line)
    assert failed.returncode == Exit.TRY_AGAIN
    assert "answered 503" in failed.stderr
    assert api.recurring == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": None}, "schedule is null"),
        ({"schedule": "0 3 L * *"}, "which KFP's scheduler does not know"),
        ({"schedule": "99 3 * * *"}, "its minute is '99'"),
        ({"schedule": {"cron": "0 3 * * 1", "time_zone": "Asia/Tokyo"}}, "schedule.time_zone: Asia/Tokyo: KFP's"),
        ({"schedule": {"on_new_data": True}}, "schedule.on_new_data: KFP starts runs only at times"),
        ({"sources": {**LINE["sources"], "raw_data": "tickets.jsonl"}}, "sources.raw_data: file://"),  # type: ignore[dict-item]
        ({"train": {"rnak": 8}}, "did you mean rank?"),
    ],
)
def test_what_a_cluster_could_not_run_is_refused_before_anything_is_sent(
    kfp: RunInKfp, api: FakeKfpApi, line: Path, change: dict[str, object], message: str
) -> None:
    line.write_text(yaml.safe_dump({**LINE, **change}))
    completed = kfp("schedule", line)
    assert completed.returncode == Exit.USAGE
    assert message in completed.stderr
    assert api.requests == []


def test_an_api_that_wants_another_token_one_that_is_not_there_and_a_url_with_a_password_are_told_apart(
    kfp: RunInKfp, api: FakeKfpApi, line: Path
) -> None:
    api.failure = ("/runs", 401)
    refused = kfp("submit", line)
    assert refused.returncode == Exit.USAGE
    assert "KF_PIPELINES_SA_TOKEN_PATH" in refused.stderr
    nobody = kfp("submit", line, endpoint="http://127.0.0.1:9")
    assert (nobody.returncode, "does not answer" in nobody.stderr) == (Exit.TRY_AGAIN, True)
    secret = kfp("submit", line, endpoint="http://me:hunter2@host")
    assert (secret.returncode, "hunter2" in secret.stderr) == (Exit.USAGE, False)
