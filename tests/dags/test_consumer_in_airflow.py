"""In a real Airflow, a run that REST starts emits the event of its line's asset, and the consumer's DAG follows.

The steps before `publish` are made already, by small steps, and the model that ships is the tiny one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.demo.airflow_api import AirflowApi
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import audit, open_store, registry

# Airflow starts in each of these files, and beside a busy program that alone may take minutes.
pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(3600)]
WAIT_SECONDS = 500.0
UserApi = Callable[[str], AirflowApi]


def make_all_but_publish(plan: Plan, small_steps: dict[str, Callable[..., StepResult]]) -> None:
    """Make every artifact except the release; the merged model is a copy of the base."""

    # With the signature of the step, which the runner compares with the graph.
    @functools.wraps(small_steps["merge_adapter"])
    def merge_adapter(*arguments: Any, **named: Any) -> StepResult:
        result = small_steps["merge_adapter"](*arguments, **named)
        shutil.copytree(named["base_model"], named["model"], dirs_exist_ok=True, copy_function=shutil.copyfile)
        return result

    for name, step in {**small_steps, "merge_adapter": merge_adapter}.items():
        if name != graph.producer_name("release"):
            assert execute.run_step(plan, name, lambda step=step: step).code == 0


def events(api: AirflowApi, dag_id: str, run_id: str) -> list[dict[str, Any]]:
    path = f"assets/events?source_dag_id={dag_id}&source_run_id={quote(run_id)}"
    items: list[dict[str, Any]] = api.request("GET", path)["asset_events"]
    return items


def wait_for(answer: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ConnectionError, TimeoutError):
            if result := answer():
                return result
        assert time.monotonic() < deadline, "not so in time"
        time.sleep(0.3)


def follow(api: AirflowApi, line: str) -> dict[str, Any]:
    """Wait for the one run of a line's consumer, and for its end; return the run."""
    dag_id = f"{line}-consume"
    (run,) = wait_for(lambda: api.request("GET", f"dags/{dag_id}/dagRuns")["dag_runs"])
    state = api.wait_until_finished(dag_id, run["dag_run_id"], timeout_seconds=WAIT_SECONDS)
    logs = [api.log_lines(dag_id, run["dag_run_id"], task) for task in ("pull", "ask")]
    assert state == "success", logs
    return api.dag_run(dag_id, run["dag_run_id"])


def test_a_run_by_rest_publishes_tells_its_asset_and_the_consumer_follows(
    airflow: StandaloneAirflow,
    user_api: UserApi,
    site_folder: Path,
    small_steps: dict[str, Callable[..., StepResult]],
) -> None:
    root = (site_folder / "store").as_uri()
    plan = make_plan.make_plan(site_folder / "pipelines" / "bulletins.yaml", root)
    make_all_but_publish(plan, small_steps)
    alice = user_api("alice")
    for dag_id in ("bulletins", "bulletins-consume"):
        airflow.wait_for_dag(dag_id)
    alice.unpause("bulletins")
    run_id = alice.trigger("bulletins", {"reason": "new words"})
    state = alice.wait_until_finished("bulletins", run_id, timeout_seconds=WAIT_SECONDS)
    assert state == "success", alice.failure_message("bulletins", run_id, "publish")

    production, _ = registry.read_alias(open_store(root), "bulletins", PRODUCTION)
    assert production is not None
    (event,) = events(alice, "bulletins", run_id)
    assert event["uri"].rstrip("/").endswith("/models/bulletins")
    extra = event["extra"]
    assert (extra["version"], extra["alias"]) == (production.version, PRODUCTION)
    assert (extra["published"], extra["moved"], len(extra["key"])) == (True, True, 64)
    assert set(extra) == {"version", "published", "moved", "alias", "key", "run", "metrics"}

    run = follow(alice, "bulletins")
    assert run["run_type"] == "asset_triggered"
    result = f"{production.version} pulled and verified; "
    assert run["note"].startswith(f"Result: {result}")
    assert (site_folder / "served" / "bulletins" / "model" / "config.json").is_file()
    (answer,) = (site_folder / "bulletins-answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["expected"] == "delivery"


@pytest.mark.soak
def test_an_api_server_that_is_killed_in_a_run_changes_nothing_and_nothing_happens_twice(
    airflow: StandaloneAirflow, user_api: UserApi, site_folder: Path, tmp_path: Path
) -> None:
    config, alice = site_folder / "pipelines" / "chronicles.yaml", user_api("alice")
    airflow.wait_for_dag("chronicles")
    alice.unpause("chronicles")
    run_id = alice.trigger("chronicles")

    def states() -> dict[str, str | None]:
        return {task.task_id: task.state for task in alice.task_states("chronicles", run_id)}

    wait_for(lambda: states().get("train_qlora") == "running")
    # With its supervisor, which would end it gracefully. Tasks and scheduler go on meanwhile.
    process = airflow._processes.pop("api-server")
    server = psutil.Process(process.pid)
    killed = [*server.children(recursive=True), server]
    for victim in killed:
        victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(killed, 10)
    process.wait()
    with pytest.raises(ConnectionError):
        alice.health()
    airflow._start_process("api-server")
    wait_for(lambda: alice.dag_run("chronicles", run_id)["state"] in ("success", "failed"), 1500)
    assert set(states().values()) == {"success"}, {
        name: alice.log_lines("chronicles", run_id, name) for name in states()
    }

    # Each artifact is there once, under the key that a run elsewhere has.
    root = (site_folder / "store").as_uri()
    (plan,) = (
        plan
        for path in (site_folder / "store" / "runs").glob("*/plan.json")
        if (plan := Plan.read(path.as_uri())).line == "chronicles"
    )
    elsewhere = make_plan.make_plan(config, tmp_path.as_uri())
    assert {step.name: step.key for step in plan.steps} == {step.name: step.key for step in elsewhere.steps}
    for step in plan.steps:
        artifact = site_folder / "store" / "artifacts" / graph.step(step.name).makes / step.key
        attempts = [path for path in artifact.iterdir() if path.is_dir()]
        assert (artifact / "_manifest.json").is_file()
        assert len(attempts) == 1, step.name
    moves, faults = audit.history(open_store(root), "chronicles")
    assert faults == []
    assert sorted((name, state.generation) for name, state in moves) == [("latest", 1), (PRODUCTION, 1)]
    assert len(events(alice, "chronicles", run_id)) == 1
    assert follow(alice, "chronicles")["note"].startswith(f"Result: {moves[-1][1].version} pulled and verified; ")
