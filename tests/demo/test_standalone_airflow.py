"""A real Airflow on loopback: runs through its REST API, errors that a person understands, no process left behind."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.demo import airflow_api, host, run
from qlora_retrain.demo.airflow_api import AirflowApi, AirflowApiError
from qlora_retrain.demo.standalone_airflow import MARKER_VARIABLE, StandaloneAirflow
from qlora_retrain.pipeline.plan import Plan

# Airflow starts here, and beside a busy program that alone may take minutes.
pytestmark = pytest.mark.timeout(3600)


def write_line(folder: Path, tickets: Path, model: Path) -> None:
    """Write a line whose data gate refuses, so that its run ends early and with a reason."""
    folder.mkdir(exist_ok=True)
    (folder / "tickets.yaml").write_text(
        f"line: tickets\nsources: {{raw_data: {tickets}, base_model: {model}}}\ndata: {{min_train_rows: 100000}}\n"
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tickets.jsonl"
    chat = '{{"messages": [{{"role": "user", "content": "order {0}"}}, {{"role": "assistant", "content": "{1}"}}]}}\n'
    path.write_text("".join(chat.format(i, "ab"[i % 2]) for i in range(300)))
    return path


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, rows: Path, tiny_model: Path) -> Iterator[StandaloneAirflow]:
    folder = tmp_path_factory.mktemp("embedded")
    write_line(folder / "pipelines", rows, tiny_model)
    (folder / "pipelines" / "letters.yaml").write_text(
        f"line: letters\nsources: {{raw_data: {rows}, base_model: {tiny_model}}}\n"
        "data: {task: labels}\ntrain: {max_steps: 2}\nevaluate: {stop_rows: 0, train_rows: 0, bootstrap_samples: 200}\n"
    )
    (folder / "platform.yaml").write_text("labs: [letters]\n")
    environment = {
        "QLORA_RETRAIN_PIPELINES": str(folder / "pipelines"),
        "QLORA_RETRAIN_PLATFORM": str(folder / "platform.yaml"),
        "QLORA_RETRAIN_ROOT": (folder / "store").as_uri(),
    }
    with StandaloneAirflow(folder / "home", environment=environment) as airflow:
        airflow.wait_for_dag("tickets")
        airflow.api.unpause("tickets")
        yield airflow


@pytest.mark.airflow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"train.learning_rate": 0}, "0 is less than or equal to the minimum of 0"),
        ({"train.rank": "16; rm -rf /"}, "is not of type 'integer'"),
        ({"publish.promote_to": "../x"}, "does not match"),
        ({"resume_run": "s3://user:secret@bucket/runs/x/plan.json"}, "does not match"),
    ],
)
def test_a_bad_field_of_the_form_is_refused_by_rest_with_its_reason(
    airflow: StandaloneAirflow, params: dict[str, object], reason: str
) -> None:
    with pytest.raises(AirflowApiError, match=reason) as caught:
        airflow.api.trigger("tickets", params)
    assert 400 <= caught.value.status < 500
    assert airflow.api.active_run_ids("tickets") == []


@pytest.mark.airflow
@pytest.mark.slow
def test_a_run_with_a_changed_knob_is_planned_with_it_and_a_refusal_fails_at_once_with_its_reason(
    airflow: StandaloneAirflow, rows: Path
) -> None:
    changes = {"train.learning_rate": 5e-5, "publish.promote_to": None, "reason": "try <b>half</b> the *rate*"}
    run_id = airflow.api.trigger("tickets", changes)
    assert airflow.api.wait_until_finished("tickets", run_id, timeout_seconds=240) == "failed"

    states = {t.task_id: (t.state, t.try_number) for t in airflow.api.task_states("tickets", run_id)}
    assert states["plan"] == ("success", 1)
    assert states["validate_data"] == ("failed", 1)  # not retried: the same data would be refused again
    assert states["publish"][0] == "upstream_failed"
    assert "data refused (10)" in airflow.api.failure_message("tickets", run_id, "validate_data")
    log = airflow.log_file("tickets", run_id, "validate_data", 1)
    # The first line that Airflow's page of a failed run shows is the reason, and the traceback is short.
    items = [json.loads(line) for line in log.read_text().splitlines()]
    first, then = [item for item in items if item.get("level") in ("error", "critical")]
    assert first["event"].startswith("data refused (10): ")
    assert [len(error["frames"]) < 12 for error in then["error_detail"]] == [True]

    # Airflow shows the note as Markdown: what people and data say is text there.
    note = airflow.api.dag_run("tickets", run_id)["note"]
    assert note.startswith("Result: validate\\_data: data refused (10): ")
    assert note.endswith("\n\nReason: try \\<b\\>half\\</b\\> the \\*rate\\*")
    links = airflow.api.request(
        "GET", f"{airflow_api._dag_run_path('tickets', run_id)}/taskInstances/validate_data/links"
    )
    path = f"/qlora-retrain/runs/tickets/{urllib.parse.quote(run_id, safe='')}"
    assert links["extra_links"] == {"Report": f"{path}/validate_data", "Run page": f"{path}/plan"}

    store = airflow.home.parent / "store"
    (plan_file,) = (store / "runs").glob("*/plan.json")
    plan = Plan.read(plan_file.as_uri())
    assert plan.step("train_qlora").config["learning_rate"] == 5e-5
    assert plan.step("publish").config["promote_to"] is None
    assert any(
        "data.min_train_rows = 100000" in line for line in airflow.api.log_lines("tickets", run_id, "validate_data")
    )


@pytest.mark.airflow
@pytest.mark.slow
def test_a_dry_run_says_what_would_run_and_starts_nothing(airflow: StandaloneAirflow) -> None:
    store = airflow.home.parent / "store"
    before = sorted(store.rglob("*"))
    run_id = airflow.api.trigger("tickets", {"dry_run": True, "train.rank": 4, "reason": "only a look"})
    assert airflow.api.wait_until_finished("tickets", run_id, timeout_seconds=240) == "success"

    states = {task.task_id: task.state for task in airflow.api.task_states("tickets", run_id)}
    assert states == {"plan": "success", **{step.name: "skipped" for step in graph.STEPS}}
    assert sorted(store.rglob("*")) == before
    log = airflow.api.log_lines("tickets", run_id, "plan")
    assert any("preview for line tickets" in line and "no step runs" in line for line in log)
    assert any("train_qlora" in line and "will run: " in line for line in log)
    note = airflow.api.dag_run("tickets", run_id)["note"]
    assert note.startswith("Result: Dry run: no step ran.  \nvalidate\\_data: ")
    assert note.endswith("\n\nReason: only a look")


@pytest.mark.airflow
@pytest.mark.slow
def test_a_run_that_is_ahead_of_the_demos_is_ended(airflow: StandaloneAirflow) -> None:
    """Airflow may start a run of its own while the demo asks for one, and a line has one run at a time."""
    # Whole runs, which a slow test does not find ended by themselves.
    ahead, own = (airflow.api.trigger("tickets") for _ in range(2))
    run.end_other_runs(airflow, "tickets", own)
    assert airflow.api.dag_run("tickets", ahead)["state"] == "failed"
    assert airflow.api.dag_run("tickets", own)["state"] in ("queued", "running")
    run.end_other_runs(airflow, "tickets")
    assert airflow.api.active_run_ids("tickets") == []


@pytest.mark.airflow
@pytest.mark.soak  # what it maps, and its form, are tested without a scheduler
def test_a_lab_maps_its_steps_over_the_points(airflow: StandaloneAirflow) -> None:
    airflow.wait_for_dag("letters-lab")
    airflow.api.unpause("letters-lab")
    run_id = airflow.api.trigger("letters-lab", {"vary": ["train.rank=2,4"], "judge_fraction": 0.2})
    assert airflow.api.wait_until_finished("letters-lab", run_id, timeout_seconds=400) == "success"

    tasks = airflow.api.task_states("letters-lab", run_id)
    states = sorted((task.task_id, task.state) for task in tasks)
    assert states == [
        ("bases.quantize_model", "success"),
        ("list_bases", "success"),
        ("plan", "success"),
        # Measured, and no better than the base, so there is nothing to merge; that is no failure of a lab.
        *[("points.evaluate", "skipped")] * 2,
        *[("points.merge_adapter", "skipped")] * 2,
        *[("points.train_qlora", "success")] * 2,
        ("report", "success"),
        ("validate_data", "success"),
    ]
    (report,) = (airflow.home.parent / "store" / "runs").glob("*/lab.json")
    document = json.loads(report.read_text())
    assert {point["label"] for point in document["points"]} == {"rank 2", "rank 4"}
    assert document["recommendation"]["sentence"] in (report.parent / "report.html").read_text()


@pytest.mark.airflow
@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_running(tmp_path: Path, rows: Path, tiny_model: Path) -> None:
    write_line(tmp_path / "pipelines", rows, tiny_model)
    driver = (
        "import time; from pathlib import Path; from qlora_retrain.demo.standalone_airflow import StandaloneAirflow\n"
        f"with StandaloneAirflow(Path({str(tmp_path / 'home')!r})) as airflow:\n"
        "    airflow.wait_for_dag('tickets'); airflow.api.unpause('tickets')\n"
        "    run = airflow.api.trigger('tickets')\n"
        "    tasks = lambda: airflow.api.task_states('tickets', run)\n"
        "    while not any(t.state == 'running' for t in tasks() if t.task_id != 'plan'):\n"
        "        time.sleep(0.05)\n"
        "    print('a step runs', flush=True); time.sleep(600)\n"
    )
    environment = {
        **os.environ,
        "QLORA_RETRAIN_PIPELINES": str(tmp_path / "pipelines"),
        "QLORA_RETRAIN_ROOT": (tmp_path / "store").as_uri(),
    }
    with subprocess.Popen(
        [sys.executable, "-c", driver], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a step runs\n"
        # Three services with their supervisors, and the task: there is something that could be left.
        descendants = psutil.Process(process.pid).children(recursive=True)
        assert len(descendants) > 6
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 300
    while (survivors := [p for p in descendants if is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert survivors == []


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([b"127.0.0.1:80"], 200),
        ([b"localhost"], 200),
        ([b"localhost", b"rebound.example"], 400),
        ([b"rebound.example", b"localhost"], 400),
        ([b"localhost", b"localhost"], 400),
        ([b"127.0.0.1@rebound.example"], 400),
        ([b"localhost."], 400),
        ([], 400),
    ],
)
def test_a_request_names_the_loopback_once(hosts: list[bytes], expected: int) -> None:
    from starlette.responses import PlainTextResponse

    from qlora_retrain.demo.airflow_plugins import loopback_names

    (middleware,) = loopback_names.LoopbackNames.fastapi_root_middlewares
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    async def receive() -> Any:
        raise AssertionError("nothing is read of a request")

    guard = middleware["middleware"](PlainTextResponse("pages"), **middleware["kwargs"])
    headers = [(b"host", host) for host in hosts]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(guard(scope, receive, send))
    assert statuses[0] == expected


@pytest.mark.airflow
@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/api/v2/dags", "/api/v2/monitor/health", "/execution/health", "/auth/token"])
@pytest.mark.parametrize("host", ["rebound.example", "127.0.0.1.rebound.example", "[::1]", "0.0.0.0", "10.0.0.1", ""])
def test_another_name_than_the_loopbacks_gets_no_answer(airflow: StandaloneAirflow, path: str, host: str) -> None:
    def status(name: str) -> int:
        server = urllib.parse.urlsplit(airflow.url).netloc
        connection = http.client.HTTPConnection(server, timeout=120)
        connection.request("GET", path, headers={"Host": name.format(port=server.partition(":")[2])})
        with contextlib.closing(connection):
            return connection.getresponse().status

    assert status(host) == 400
    assert status("127.0.0.1:{port}") == status("localhost") != 400


@pytest.mark.airflow
@pytest.mark.slow
def test_the_api_asks_for_the_password_of_this_start(airflow: StandaloneAirflow, tmp_path: Path) -> None:
    airflow.api.dag("tickets")
    # Nobody is let in without it, and not by the way for servers without a login either.
    for method, path in (("GET", "api/v2/dags"), ("PATCH", "api/v2/dags/tickets"), ("GET", "auth/token")):
        with pytest.raises(AirflowApiError) as caught:
            AirflowApi(airflow.url)._send(method, path, {} if method == "PATCH" else None)
        assert caught.value.status in (401, 403)
    for password in ("", "admin", StandaloneAirflow(tmp_path).password):
        with pytest.raises(AirflowApiError) as caught:
            AirflowApi(airflow.url, password).dag("tickets")
        assert caught.value.status in (400, 401)

    file = airflow.home / "passwords.json"
    assert (file.stat().st_mode & 0o777, airflow.home.stat().st_mode & 0o777) == (0o600, 0o700)
    assert json.loads(file.read_text()) == {"admin": airflow.password}
    # It is in no log and in no process's arguments.
    assert not [log for log in airflow.home.rglob("*.log") if airflow.password in log.read_text(errors="replace")]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_home_serves_one_airflow_at_a_time(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="runs there already"), StandaloneAirflow(tmp_path):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_settings_of_another_airflow_do_not_reach_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://production")
    monkeypatch.setenv("AIRFLOW_CONFIG", "/etc/airflow.cfg")
    airflow = StandaloneAirflow(tmp_path, port=1)
    airflow.url = "http://127.0.0.1:1"
    settings = airflow._build_environment()
    assert settings["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == f"sqlite:///{tmp_path / 'airflow.db'}"
    assert "AIRFLOW_CONFIG" not in settings
    assert settings["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert settings[MARKER_VARIABLE] != StandaloneAirflow(tmp_path)._marker


def test_a_reserved_port_is_given_to_nobody_else_and_a_server_that_is_told_it_listens_there() -> None:
    port, reservation = host.reserve_port()
    with reservation:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)
        # The system gives a port of its choice only to whom it would also give it by number.
        with socket.socket() as another, pytest.raises(OSError, match="Address already in use"):
            another.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)):
            socket.create_connection(("127.0.0.1", port), timeout=10).close()


def test_what_is_killed_by_its_mark_is_gone_when_that_returns() -> None:
    marker = f"the mark of test process {os.getpid()}"
    # Much memory, which the kernel takes back before the process has ended.
    program = "import time; memory = b'x' * 2**28; print(flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, MARKER_VARIABLE: marker}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        host.kill_marked_processes(marker)
        assert not is_alive(psutil.Process(process.pid))


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with pytest.raises(ConnectionError):
        AirflowApi("http://127.0.0.1:9").health()
