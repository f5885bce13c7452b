"""What the platform adds to lines, in a real Airflow: messages, a hook, a deadline, a pause, assets and lineage."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from tests import hub_repository
from tests.hub_repository import HubRepository

# Airflow starts in each of these files, and beside a busy program that alone may take minutes.
pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(3600)]
KEY = "whsec_" + "QUJD" * 10
LABELS = {
    "data": {"task": "labels", "eval_fraction": 0.3, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 6, "micro_batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"allow_first_release": True, "bootstrap_samples": 200, "stop_rows": 0, "train_rows": 0},
    "merge": {"max_loss_increase_nats": 2.0, "min_prompts": 10},
}
MIRROR = {"publish": {"mirror": [f"hf://{hub_repository.NAME}", "mlflow"]}}
PLATFORM = {
    # A deadline of some seconds, which every run misses.
    "lines": {"tickets": {"deadline_hours": 0.001, "pause_after_failures": 1}},
    "notify": [
        {"events": ["failure", "refused", "published", "deadline"], "connection": "ops", "kind": "webhook"},
        {"events": ["refused"], "connection": "absent", "kind": "webhook"},
    ],
    "hooks": [{"line": "letters", "connection": "server"}],
    "mirrors": [
        {"line": "letters", "to": f"hf://{hub_repository.NAME}", "connection": "hub"},
        {"line": "*", "to": "mlflow", "connection": "absent"},
    ],
}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubRepository]:
    with pytest.MonkeyPatch.context() as patch, hub_repository.serve(patch) as server:
        yield server


@pytest.fixture(scope="module")
def airflow(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    write_tickets: Callable[[Path, int], Path],
    shared_receiver: Any,
    hub: HubRepository,
) -> Iterator[StandaloneAirflow]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "lines").mkdir()
    sources = {"raw_data": str(write_tickets(folder / "rows.jsonl", 200)), "base_model": str(tiny_model)}
    lines = {"tickets": {"data": {"min_train_rows": 100_000}}, "letters": LABELS | MIRROR}
    for name, sections in lines.items():
        document = {"line": name, "sources": sources, **sections}
        (folder / "lines" / f"{name}.yaml").write_text(yaml.safe_dump(document))
    (folder / "platform.yaml").write_text(yaml.safe_dump(PLATFORM))
    connection = {"conn_type": "http", "host": shared_receiver.url, "password": KEY}
    transport = {"type": "file", "log_file_path": str(folder / "lineage.jsonl"), "append": True}
    environment = {
        "QLORA_RETRAIN_PIPELINES": str(folder / "lines"),
        "QLORA_RETRAIN_PLATFORM": str(folder / "platform.yaml"),
        "QLORA_RETRAIN_ROOT": (folder / "store").as_uri(),
        "QLORA_RETRAIN_CACHE": str(folder / "cache"),
        "AIRFLOW_CONN_OPS": json.dumps(connection),
        "AIRFLOW_CONN_SERVER": json.dumps(connection | {"host": f"{shared_receiver.url}/reload"}),
        "AIRFLOW_CONN_HUB": json.dumps({"conn_type": "http", "host": hub.url, "password": hub_repository.TOKEN}),
        "HF_HUB_DISABLE_XET": "1",
        "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(transport),
        "AIRFLOW__OPENLINEAGE__NAMESPACE": "retrain",
        # Of an event that takes longer nothing is written, and by default that is ten seconds.
        "AIRFLOW__OPENLINEAGE__EXECUTION_TIMEOUT": "120",
    }
    with StandaloneAirflow(folder / "home", environment=environment) as airflow:
        triggerer = [sys.executable, "-m", "airflow", "triggerer", "--skip-serve-logs"]
        with (folder / "triggerer.log").open("wb") as log:
            process = subprocess.Popen(triggerer, env=airflow._environment, stdout=log, stderr=log)
        try:
            for line in lines:
                airflow.wait_for_dag(line)
                airflow.api.unpause(line)
            yield airflow
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def refused(airflow: StandaloneAirflow) -> str:
    """The id of a run whose data are refused."""
    run_id = airflow.api.trigger("tickets")
    assert airflow.api.wait_until_finished("tickets", run_id, timeout_seconds=400) == "failed"
    return run_id


@pytest.fixture(scope="module")
def published(airflow: StandaloneAirflow) -> str:
    """The id of a run that publishes a version and moves `production`."""
    run_id = airflow.api.trigger("letters")
    assert airflow.api.wait_until_finished("letters", run_id, timeout_seconds=400) == "success"
    return run_id


def wait_for(is_there: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert is_there()


def states(airflow: StandaloneAirflow, line: str, run_id: str) -> dict[str, tuple[str | None, int]]:
    return {t.task_id: (t.state, t.try_number) for t in airflow.api.task_states(line, run_id)}


def test_a_refusal_is_told_and_a_message_that_fails_changes_no_run(
    airflow: StandaloneAirflow, refused: str, shared_receiver: Any
) -> None:
    tasks = states(airflow, "tickets", refused)
    assert (tasks["notify_ops"], tasks["notify_absent"]) == (("success", 1), ("failed", 1))
    message = airflow.api.failure_message("tickets", refused, "notify_absent")
    assert message.startswith("connection absent: not defined in Airflow")

    (message,) = (d["data"] for d in shared_receiver.documents if d["type"] == "run.refused")
    assert (message["line"], message["run"]) == ("tickets", refused)
    assert message["sentence"].startswith("validate_data: data refused (10)")
    assert message["links"]["airflow"].startswith(f"{airflow.url}/dags/tickets/runs/manual__")


def documents(receiver: Any, kind: str) -> list[tuple[str, Any]]:
    """What the receiver got of this kind, with the path that it came by."""
    pairs = zip(receiver.requests, receiver.documents, strict=True)
    return [(path, document["data"]) for (path, _, _), document in pairs if document["type"] == kind]


def test_a_published_version_is_mirrored_and_a_mirror_that_fails_changes_no_run(
    airflow: StandaloneAirflow, published: str, hub: HubRepository
) -> None:
    tasks = states(airflow, "letters", published)
    assert (tasks["mirror_hf-owner-model"], tasks["mirror_mlflow"]) == (("success", 1), ("failed", 1))
    assert airflow.api.failure_message("letters", published, "mirror_mlflow").endswith(
        "connection absent: not defined in Airflow; `airflow connections add absent ...`"
    )
    assert set(hub.branches) == {"main"}
    (tag,) = hub.tags
    files = hub.content(tag)
    assert hub.content("main") == files
    assert json.loads(files["manifest.json"])["version"] == tag
    assert {"README.md", "model/config.json", "model/model.safetensors"} <= set(files)


def test_a_missed_deadline_is_told(airflow: StandaloneAirflow, refused: str, shared_receiver: Any) -> None:
    wait_for(lambda: bool(documents(shared_receiver, "run.deadline")))
    late = [(document["line"], document["run"]) for _, document in documents(shared_receiver, "run.deadline")]
    assert late == [("tickets", refused)]


def test_a_line_is_paused_after_so_many_failed_runs(airflow: StandaloneAirflow, refused: str) -> None:
    wait_for(lambda: bool(airflow.api.dag("tickets")["is_paused"]))
    assert not airflow.api.dag("letters")["is_paused"]


def lineage(airflow: StandaloneAirflow) -> dict[str, Any]:
    """The last event of each task, by its job's name."""
    path = airflow.home.parent / "lineage.jsonl"
    assert KEY not in path.read_text()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return {e["job"]["name"]: e for e in events if e["eventType"] in ("COMPLETE", "FAIL")}


def facets(event: dict[str, Any], side: str) -> dict[str, Any]:
    """The facets of an event's datasets, by their names."""
    return {item["name"]: item["facets"] for item in event[side]}


def test_openlineage_gets_what_a_step_read_and_made_and_the_raw_data_are_an_asset(
    airflow: StandaloneAirflow, refused: str, tiny_model: Path
) -> None:
    folder = airflow.home.parent
    event = lineage(airflow)["tickets.validate_data"]
    # A refused artifact is complete, too.
    assert event["eventType"] == "FAIL"
    assert {name: bool(item["version"]) for name, item in facets(event, "inputs").items()} == {
        str(tiny_model): True,
        str(folder): True,
    }
    (dataset,) = facets(event, "outputs").items()
    assert dataset[0] == f"{folder}/store/tickets/dataset"
    assert {"key": "rows_read", "value": "200", "source": "qlora-retrain"}.items() <= dataset[1]["tags"]["tags"][
        0
    ].items()
    names = {asset["name"] for asset in airflow.api.request("GET", "assets")["assets"]}
    assert {"letters.raw_data", "tickets.raw_data"} <= names


def test_no_secret_is_in_a_log(airflow: StandaloneAirflow, refused: str) -> None:
    texts = [log.read_text(errors="replace") for log in airflow.home.parent.rglob("*.log")]
    assert len(texts) > 8
    assert not [text for text in texts if KEY in text or KEY.removeprefix("whsec_") in text]


# Three minutes where another program runs beside it: six steps, each of which imports its libraries.
@pytest.mark.soak
def test_a_new_version_is_told_to_people_to_the_server_to_assets_and_to_lineage(
    airflow: StandaloneAirflow, published: str, shared_receiver: Any
) -> None:
    tasks = states(airflow, "letters", published)
    assert (tasks["notify_ops"], tasks["hook_server"]) == (("success", 1), ("success", 1))
    # Nobody is told of a refusal where there was none.
    assert tasks["notify_absent"] == ("skipped", 1)
    ((_, message),) = documents(shared_receiver, "run.published")
    assert set(message["numbers"]) == {"accuracy_challenger", "accuracy_base"}
    ((path, move),) = documents(shared_receiver, "alias.moved")
    assert (path, move["version"]) == ("/reload", message["version"])

    (event,) = airflow.api.request("GET", "assets/events")["asset_events"]
    assert event["uri"].endswith("/store/models/letters")
    extra = event["extra"]
    assert (extra["version"], extra["alias"], extra["moved"]) == (message["version"], "production", True)
    assert extra["metrics"] == message["numbers"]

    events, root = lineage(airflow), airflow.home.parent / "store"
    # The version that one step made is the one that the next read.
    dataset = f"{root}/letters/dataset"
    written = facets(events["letters.validate_data"], "outputs")[dataset]
    assert facets(events["letters.train_qlora"], "inputs")[dataset]["version"] == written["version"]
    model = facets(events["letters.publish"], "outputs")[f"{root}/models/letters"]
    assert model["version"]["datasetVersion"] == message["version"]
    assert model["datasetType"]["datasetType"] == "MODEL"
