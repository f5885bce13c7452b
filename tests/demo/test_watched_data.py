"""A file lands in a folder and a run starts: the line's watcher in the triggerer of a real Airflow."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_retrain.demo.airflow_api import AirflowApiError
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.pipeline.plan import Plan

# Airflow starts in each of these files, and beside a busy program that alone may take minutes.
pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(3600)]
# The project's DAG file, with watchers that look every second: the shortest time that a line can set is a minute.
DAG_FILE = """
import functools, runpy
from qlora_retrain.runtimes.airflow import schedules
schedules.raw_data_asset = functools.partial(schedules.raw_data_asset, check_seconds=1.0)
globals().update(runpy.run_path({path!r}))
"""
# The data gate refuses, so that a run ends early.
LINE = "line: {line}\nsources: {{raw_data: {data}, base_model: {model}}}\ndata: {{min_train_rows: 100000}}\n"
CHAT = '{{"messages": [{{"role": "user", "content": "order {0}"}}, {{"role": "assistant", "content": "a"}}]}}\n'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    add_file(folder, "first.jsonl")
    return folder


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_model: Path) -> Iterator[StandaloneAirflow]:
    folder = tmp_path_factory.mktemp("watching")
    for name in ("pipelines", "dags"):
        (folder / name).mkdir()
    path = str(Path(__file__).resolve().parents[2] / "dags" / "retrain.py")
    (folder / "dags" / "dag_file.py").write_text(DAG_FILE.format(path=path))
    schedules = {
        "landing": "{on_new_data: true}",
        "both": "{on_new_data: true, cron: '0 3 * * 1', time_zone: Europe/Berlin}",
    }
    for line, schedule in schedules.items():
        text = LINE.format(line=line, data=data, model=tiny_model)
        (folder / "pipelines" / f"{line}.yaml").write_text(f"{text}schedule: {schedule}\n")
    environment = {
        "QLORA_RETRAIN_PIPELINES": str(folder / "pipelines"),
        "QLORA_RETRAIN_ROOT": (folder / "store").as_uri(),
        # A line is watched from the first parse after it was switched on.
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "2",
    }
    with StandaloneAirflow(
        folder / "home", dags=folder / "dags", triggerer=True, environment=environment
    ) as standalone:
        for line in schedules:
            standalone.wait_for_dag(line)
        standalone.api.unpause("landing")
        wait_until(lambda: num_watchers_that_looked(standalone) >= 1, 300)
        yield standalone


def add_file(folder: Path, name: str) -> None:
    (folder / name).write_text("".join(CHAT.format(i) for i in range(50)))


def num_watchers_that_looked(airflow: StandaloneAirflow) -> int:
    return (airflow.home / "triggerer.log").read_text(errors="replace").count("the next change starts a run")


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "not so in time"
        time.sleep(0.3)


def dag_runs(airflow: StandaloneAirflow) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = airflow.api.request("GET", "dags/landing/dagRuns?order_by=run_after")["dag_runs"]
    return runs


def test_a_file_that_lands_starts_one_run_and_the_other_line_none(airflow: StandaloneAirflow, data: Path) -> None:
    assert dag_runs(airflow) == []  # what lay there when the line was switched on is not new
    add_file(data, "second.jsonl")
    wait_until(lambda: bool(dag_runs(airflow)), 300)
    (run,) = dag_runs(airflow)
    assert (run["run_type"], run["logical_date"]) == ("asset_triggered", None)
    assert airflow.api.wait_until_finished("landing", run["dag_run_id"], timeout_seconds=500) == "failed"
    assert "data refused (10)" in airflow.api.failure_message("landing", run["dag_run_id"], "validate_data")

    (plan_file,) = (airflow.home.parent / "store" / "runs").glob("*/plan.json")
    source = Plan.read(plan_file.as_uri()).sources["raw_data"]
    assert source is not None
    assert [file.path for file in source.files] == ["first.jsonl", "second.jsonl"]
    (event,) = airflow.api.request("GET", "assets/events")["asset_events"]
    assert (event["name"], event["extra"]["payload"]["files"]) == ("landing.raw_data", 2)
    assert len(dag_runs(airflow)) == 1
    assert sorted(path.name for path in data.iterdir()) == ["first.jsonl", "second.jsonl"]


def test_a_backfill_is_for_times_and_is_refused_in_words_where_there_are_none(airflow: StandaloneAirflow) -> None:
    reason = "landing has a non-periodic schedule that does not support backfills"
    dates = {"from_date": "2026-03-20T00:00:00Z", "to_date": "2026-04-01T00:00:00Z"}
    for path in ("backfills", "backfills/dry_run"):
        with pytest.raises(AirflowApiError, match=reason):
            airflow.api.request("POST", path, {"dag_id": "landing", **dates})
    times = airflow.api.request("POST", "backfills/dry_run", {"dag_id": "both", **dates})["backfills"]
    # The clocks of Berlin changed between the two.
    assert [time["logical_date"] for time in times] == ["2026-03-23T02:00:00Z", "2026-03-30T01:00:00Z"]


@pytest.mark.soak
def test_a_triggerer_that_was_killed_loses_no_change_and_repeats_none(airflow: StandaloneAirflow, data: Path) -> None:
    before = len(dag_runs(airflow))
    supervisor = psutil.Process(airflow._processes["triggerer"].pid)
    processes = [*supervisor.children(recursive=True), supervisor]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, 10)
    airflow._processes.pop("triggerer").wait()
    add_file(data, "third.jsonl")  # while nobody looks
    airflow._start_process("triggerer")

    wait_until(lambda: len(dag_runs(airflow)) == before + 1, 600)
    run = dag_runs(airflow)[-1]
    assert airflow.api.wait_until_finished("landing", run["dag_run_id"], timeout_seconds=500) == "failed"
    time.sleep(5)  # several looks
    assert len(dag_runs(airflow)) == before + 1
    assert json.dumps(airflow.api.import_errors()) == "[]"
