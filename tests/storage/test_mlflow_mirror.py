"""Mirrors in MLflow's model registry: what a real server has afterwards, and what is refused before it is asked."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import mirror, mlflow_mirror, open_store, registry, versions
from qlora_retrain.storage.mlflow_api import MlflowServer
from qlora_retrain.storage.store import Store
from tests import mlflow_server
from tests.storage.small_versions import LINE, WEIGHTS, files_of, listed, publish, release_of

TOKEN = "a-token-of-a-test"
CERTIFICATE = {"evaluation/certificate.json": json.dumps({"verdict": "pass"}).encode()}


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server.serve(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def s3_store(s3_uri: str) -> Store:
    # Without the space, which is another test's.
    return open_store(s3_uri.replace("team a", "team"))


def publish_judged(store: Store, number: int) -> registry.Release:
    """A version with a verdict and numbers, that production names."""
    files = {**files_of(number), **CERTIFICATE}
    numbers = {"evaluation": {"accuracy_challenger": 0.5 + number / 10, "metric": "accuracy"}, "dataset": {"rows": 90}}
    release = release_of(listed(files), number).model_copy(
        update={
            "numbers": numbers,
            "provenance": {"run_id": f"run-{number}"},
            "created_at": "2026-01-01T00:00:00+00:00",
        }
    )
    for path, data in files.items():
        store.write_if_absent(f"{registry.version_folder(LINE, release.version)}/{path}", data)
    release = registry.complete_version(store, release)
    registry.move_alias(store, LINE, "production", release, reason="a test", is_verified=True)
    return release


@pytest.mark.soak
def test_a_real_server_has_the_version_its_numbers_and_production_once(
    s3_store: Store, real_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", real_server)
    first = publish_judged(s3_store, 1)
    result = mirror.mirror(s3_store, LINE, "production", "mlflow")
    assert (result.place, result.is_new, result.is_production) == (f"models:/{LINE}/1", True, True)
    assert not mirror.mirror(s3_store, LINE, first.version, "mlflow").is_new

    second = publish_judged(s3_store, 2)
    assert mirror.mirror(s3_store, LINE, "production", "mlflow").place == f"models:/{LINE}/2"
    # The older one again: production stays.
    assert not mirror.mirror(s3_store, LINE, first.version, "mlflow").is_production

    # Read by MLflow's own client, in the server's environment.
    code = f"""
import json, mlflow
client = mlflow.MlflowClient()
versions = client.search_model_versions("name='{LINE}'")
production = client.get_model_version_by_alias("{LINE}", "production")
run = client.get_run(production.run_id)
runs = client.search_runs([run.info.experiment_id])
folder = mlflow.artifacts.download_artifacts("models:/{LINE}@production", dst_path={str(tmp_path)!r})
print(json.dumps([len(versions), production.version, production.source, production.tags, run.data.metrics,
    run.info.status, run.info.run_name, len(runs), folder]))
"""
    output = subprocess.run(
        [mlflow_server.ENVIRONMENT / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    count, number, source, tags, metrics, status, name, num_runs, folder = json.loads(output.splitlines()[-1])
    assert (count, number, num_runs) == (2, "2", 2)
    assert source == f"{s3_store.uri}/models/{LINE}/versions/{second.version}"
    assert tags == {
        "qlora_retrain.version": second.version,
        "qlora_retrain.manifest_sha256": second.sha256,
        "qlora_retrain.content_hash": second.content_hash,
        "qlora_retrain.verdict": "pass",
        "qlora_retrain.run": "run-2",
    }
    assert metrics == {"dataset.rows": 90.0, "evaluation.accuracy_challenger": 0.7}
    assert (status, name) == ("FINISHED", second.version)
    assert (Path(folder) / WEIGHTS).read_bytes() == files_of(2)[WEIGHTS]

    registry.rollback(s3_store, LINE, "production", reason="worse")
    assert mirror.mirror(s3_store, LINE, "production", "mlflow").place == f"models:/{LINE}/1"
    server = MlflowServer()
    answer = server.get("registered-models/alias", name=LINE, alias="production")
    assert answer["model_version"]["version"] == "1"

    # What somebody else has put there under this name is refused, and stays.
    third = publish_judged(s3_store, 3)
    tag = {"key": "qlora_retrain.version", "value": third.version}
    server.post("model-versions/create", {"name": LINE, "source": "s3://elsewhere/x", "tags": [tag]})
    with pytest.raises(IntegrityError, match=f"models:/{LINE}/3.*another source"):
        mirror.mirror(s3_store, LINE, "production", "mlflow")
    server.close()


@pytest.mark.soak
def test_a_mirror_that_dies_at_any_request_is_completed_by_the_next_one(
    s3_store: Store, real_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", real_server)
    request = MlflowServer._request
    for number in range(1, 30):
        release = publish_judged(s3_store, 5)
        # Another model in MLflow every time.
        line = f"{LINE}-{number}"
        renamed = release.model_copy(update={"line": line})
        for module in (registry, versions):
            monkeypatch.setattr(module, "version_folder", lambda line, version: f"models/{LINE}/versions/{version}")
        renamed._sha256 = release.sha256
        count = 0

        def dying(self: Any, method: str, path: str, number: int = number, **arguments: Any) -> Any:
            nonlocal count
            count += 1
            answer = request(self, method, path, **arguments)
            if count == number:
                raise TryAgain("killed: the answer never came")
            return answer

        monkeypatch.setattr(MlflowServer, "_request", dying)
        try:
            mlflow_mirror.mirror_version(s3_store, renamed, is_production=lambda: True)
        except TryAgain:
            has_ended = False
        else:
            has_ended = True
        monkeypatch.setattr(MlflowServer, "_request", request)
        assert mlflow_mirror.mirror_version(s3_store, renamed, is_production=lambda: True).place == f"models:/{line}/1"
        server = MlflowServer()
        listed_versions = list(server.pages("model-versions/search", "model_versions", filter=f"name='{line}'"))
        assert [version["version"] for version in listed_versions] == ["1"]
        assert server.get("registered-models/alias", name=line, alias="production")["model_version"]["version"] == "1"
        server.close()
        if has_ended:
            break
    assert number > 8


class Answers(BaseHTTPRequestHandler):
    """Answers everything with one status and one text, and remembers the headers."""

    status, text, seen_headers = 200, b"{}", dict[str, str]()

    def do_GET(self) -> None:
        type(self).seen_headers = {k.lower(): v for k, v in self.headers.items()}
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
        yield Answers
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "text", "error", "message"),
    [
        (401, b"", UsageError, "answered 401: its token"),
        (403, b"{}", UsageError, "answered 403: its token"),
        (404, b"<html>", UsageError, "no MLflow server answers there"),
        (302, b"", UsageError, "answered 302"),
        (200, b"<html>", UsageError, "no MLflow server answers there"),
        (
            400,
            b'{"error_code": "X", "message": "a \\u001b[31mtext"}',
            UsageError,
            "answered 400 to runs/create: a .u001b",
        ),
        (429, b"", TryAgain, "answered 429"),
        (503, b"", TryAgain, "answered 503"),
    ],
)
def test_what_the_server_answers_is_an_error_of_ours_without_its_address_and_the_token(
    answers: type[Answers],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    text: bytes,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(answers, "status", status)
    monkeypatch.setattr(answers, "text", text)
    server = MlflowServer()
    with pytest.raises(error, match=message.replace(".u001b", ".{1,8}")) as refused:
        server.get("runs/create")
    assert "127.0.0.1" not in str(refused.value)
    assert answers.seen_headers["authorization"] == f"Bearer {TOKEN}"
    server.close()


def test_a_server_that_is_not_there_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    server = MlflowServer()
    with pytest.raises(TryAgain, match="cannot be reached"):
        server.get("runs/create")
    server.close()


def test_a_store_in_a_folder_and_no_server_are_refused(
    tmp_path: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = open_store((tmp_path / "store").as_uri())
    publish(local, 1)
    with pytest.raises(UsageError, match="use a store in S3"):
        mirror.mirror(local, LINE, "production", "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    publish(s3_store, 1)
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI"):
        mirror.mirror(s3_store, LINE, "production", "mlflow")
