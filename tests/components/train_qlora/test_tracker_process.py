"""A tracker that is away, slow or wrong never fails or slows training; fake clients in real processes."""

from __future__ import annotations

import io
import json
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.train_qlora.preflight import check_environment
from components.train_qlora.trackers import client_process, keys, trackers
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError

# A client that writes what it gets to a file, after whatever a test has it do first.
MLFLOW = """
    import json, os, pathlib, sys, time
    from types import SimpleNamespace
    folder, run = pathlib.Path(os.environ["FAKE"]), None
    def record(*what):
        with (folder / "records").open("a") as file:
            print(json.dumps(what), file=file)
    def fault(name):
        print("the client's own words")
        exec((folder / name).read_text()) if (folder / name).is_file() else None
    fault("import")
    def active_run(): return run
    def set_experiment(name): record("experiment", name)
    def start_run():
        global run
        fault("start"); run = SimpleNamespace(); record("start")
    def log_params(params): record("params", params["rank"])
    def log_metrics(metrics, step): fault("log"); record("log", step, metrics["loss"])
    def end_run(status): fault("end"); record("end", status)
"""
WANDB = """
    import json, os, pathlib
    run = None
    def record(*what):
        with (pathlib.Path(os.environ["FAKE"]) / "records").open("a") as file:
            print(json.dumps(what), file=file)
    def init(project, config):
        global run
        run = 1; record("init", project, config["rank"], os.environ.get("WANDB_MODE"))
    def define_metric(*a, **k): pass
    def log(values): record("log", values)
    def finish(exit_code): record("finish", exit_code)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both clients, on the path of this process and of those that it starts."""
    for name, source in (("mlflow", MLFLOW), ("wandb", WANDB)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in [name for name in os.environ if name.startswith(("WANDB", "MLFLOW", "DATABRICKS", "NETRC"))]:
        monkeypatch.delenv(variable)
    # A busy machine takes long to start a process; nothing waits so long for one that answers, or says that it cannot.
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 200.0)
    return tmp_path


def records(fake: Path) -> list[list[Any]]:
    path = fake / "records"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(count: int) -> Callable[[trackers.Trackers], None]:
    """Training: so many steps, each with a loss."""

    def train(report: trackers.Trackers) -> None:
        for step in range(1, count + 1):
            report.log(step, {"loss": 1 / step})

    return train


def train_with(*names: str, work: Callable[[trackers.Trackers], None]) -> float:
    """Train and report to these trackers; how many seconds the work and the end took."""
    begin = time.monotonic()
    with trackers.started(TrainConfig(report_to=list(names))) as report:
        work(report)
    return time.monotonic() - begin


def test_a_tracker_gets_the_settings_and_every_step_once_in_order(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tickets")
    train_with("mlflow", work=losses(200))
    rank = TrainConfig().rank
    logged = [["log", step, 1 / step] for step in range(1, 201)]
    assert records(fake) == [["experiment", "tickets"], ["start"], ["params", str(rank)], *logged, ["end", "FINISHED"]]
    assert "the client's own words" not in capfd.readouterr().out


def test_wandb_gets_the_names_that_transformers_gave(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "tickets")
    monkeypatch.setenv("WANDB_DISABLED", "true")

    def work(report: trackers.Trackers) -> None:
        report.log(7, {"eval_loss": 2.0, "loss": 1.0})

    train_with("wandb", work=work)
    assert records(fake) == [
        ["init", "tickets", TrainConfig().rank, "disabled"],
        ["log", {"eval/loss": 2.0, "train/loss": 1.0, "train/global_step": 7}],
        ["finish", 0],
    ]


def test_a_failed_run_is_ended_as_failed(fake: Path) -> None:
    def work(report: trackers.Trackers) -> None:
        losses(1)(report)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_with("mlflow", work=work)
    assert records(fake)[-1] == ["end", "FAILED"]


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("import", "raise ImportError('built for another Python')"),
        ("start", "raise ConnectionError('refused')"),
        ("start", "sys.exit('not logged in')"),
        ("log", "raise OSError('the server died')"),
        ("end", "raise RuntimeError('gone')"),
        ("log", "os._exit(3)"),
    ],
)
def test_a_client_that_fails_is_one_warning_and_no_delay(
    fake: Path, capsys: pytest.CaptureFixture[str], point: str, fault: str
) -> None:
    # The client fails once all steps are logged, so a step that waited for it would never end.
    (fake / point).write_text(f"while not (folder / 'logged').exists(): time.sleep(0.01)\n{fault}")

    def work(report: trackers.Trackers) -> None:
        losses(1000)(report)
        (fake / "logged").touch()
        # As long as the first steps of a real run.
        wait_for(lambda: report.trackers[0].is_away or report.trackers[0].process.poll() is not None)

    if point == "end":
        (fake / "logged").touch()
        work = losses(3)
    train_with("mlflow", work=work)
    output = capsys.readouterr().out
    assert output.count("warning: train.report_to: mlflow") >= 1 or "os._exit" in fault
    assert output.count("training goes on without it") <= 1
    if "raise" in fault:
        assert fault.split("'")[1] in output


def test_a_tracker_whose_process_cannot_be_started_is_one_warning(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def popen(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(trackers.subprocess, "Popen", popen)
    train_with("mlflow", work=losses(3))
    assert "mlflow cannot start, and training goes on without it" in capsys.readouterr().out


def test_what_a_client_says_is_on_one_line_and_repeats_no_secret() -> None:
    reports = io.StringIO()
    client_process._report(reports, "GET https://me:canary@host/api?token=canary\n failed")
    assert json.loads(reports.getvalue()) == {"error": "GET https://***@host/api?*** failed"}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_hangs_costs_the_limit_at_the_end_and_nothing_before(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "start").write_text("time.sleep(1000)")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(trackers, "MAX_WAITING", 100)
    seconds = train_with("mlflow", work=losses(20_000))
    # The client would take 1000 s.
    assert seconds < 60.0
    output = capsys.readouterr().out
    assert output.count("mlflow did not take everything in time") == 1


def test_a_step_that_is_asked_to_stop_does_not_wait_for_a_tracker_that_hangs(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "start").write_text("time.sleep(1000)")
    monkeypatch.setattr(trackers.signals, "stop_requested", lambda: True)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS_STOPPED", 0.1)
    # A step that is not asked to stop would wait for 200 s.
    assert train_with("mlflow", work=losses(3)) < 60.0


def test_a_stopped_process_is_dropped_lines_and_no_wait(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "MAX_WAITING", 100)

    def work(report: trackers.Trackers) -> None:
        os.kill(report.trackers[0].process.pid, signal.SIGSTOP)
        losses(5000)(report)

    # The process would take for ever.
    assert train_with("mlflow", work=work) < 60.0
    assert capsys.readouterr().out.count("too slow; further numbers are dropped") == 1


def test_a_server_that_comes_back_gets_what_it_missed(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "start").write_text("raise ConnectionError('away')")

    def work(report: trackers.Trackers) -> None:
        losses(5)(report)
        wait_for(lambda: report.trackers[0].is_away)
        (fake / "start").unlink()
        wait_for(lambda: not report.trackers[0].is_away)

    train_with("mlflow", work=work)
    assert [record[1] for record in records(fake) if record[0] == "log"] == [1, 2, 3, 4, 5]
    assert "ConnectionError: away" in (output := capsys.readouterr().out)
    assert "mlflow can be used again" in output


def test_without_trackers_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.subprocess, "Popen", None)
    train_with(work=losses(3))


@pytest.mark.parametrize(
    ("name", "variables", "files", "missing"),
    [
        ("wandb", {}, {}, "has no key for api.wandb.ai; set WANDB_API_KEY"),
        ("wandb", {"WANDB_API_KEY": ""}, {}, "has no key"),
        ("wandb", {"WANDB_API_KEY": "0123"}, {}, None),
        ("wandb", {"WANDB_MODE": "offline"}, {}, None),
        ("wandb", {"WANDB_MODE": "disabled"}, {}, None),
        ("wandb", {"WANDB_MODE": "online"}, {}, "has no key"),
        ("wandb", {"WANDB_DISABLED": "true"}, {}, None),
        ("wandb", {"WANDB_BASE_URL": "https://wandb.acme.example"}, {}, "has no key for wandb.acme.example"),
        ("wandb", {}, {".netrc": "machine api.wandb.ai login user password 0123\n"}, None),
        ("wandb", {}, {"_netrc": "machine api.wandb.ai login user password 0123\n"}, None),
        ("wandb", {}, {".netrc": "machine github.com login user password 0123\n"}, "has no key"),
        ("wandb", {}, {".netrc": "machine\n{"}, "has no key"),
        ("wandb", {}, {".config/wandb/settings": "[default]\nmode = offline\n"}, None),
        ("wandb", {}, {".config/wandb/settings": "[default]\nbase_url = https://w.example\n"}, "no key for w.example"),
        ("mlflow", {}, {}, None),
        ("mlflow", {"MLFLOW_TRACKING_URI": "https://mlflow.acme.example"}, {}, None),
        ("mlflow", {"MLFLOW_TRACKING_USERNAME": "me"}, {}, "set MLFLOW_TRACKING_PASSWORD"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "databricks"}, {}, "has no key for Databricks"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "databricks", "DATABRICKS_TOKEN": "x"}, {}, None),
        ("mlflow", {"MLFLOW_TRACKING_URI": "databricks://prod"}, {".databrickscfg": "[prod]\n"}, None),
    ],
)
def test_a_missing_key_is_12_before_anything_is_read(
    fake: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    variables: dict[str, str],
    files: dict[str, str],
    missing: str | None,
) -> None:
    monkeypatch.chdir(fake)
    for path, text in files.items():
        (fake / path).parent.mkdir(parents=True, exist_ok=True)
        (fake / path).write_text(text)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)

    config = TrainConfig(report_to=[name], device="cpu", kernels="torch")
    if missing is None:
        check_environment(config)
    else:
        with pytest.raises(UsageError, match=rf"train\.report_to: {name} .*{missing}.*, or leave it out of the line"):
            check_environment(config)


def test_a_missing_package_is_12(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"train\.report_to: wandb is not installed where the step runs"):
        keys.refuse_unready("wandb")


def test_training_with_a_tracker_that_dies_makes_the_same_adapter(
    fake: Path, step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "log").write_text("raise OSError('the server died')")
    plain, tracked = step("plain"), step("tracked")
    plain(max_steps=3)
    numbers = tracked(max_steps=3, report_to=["mlflow"])
    assert numbers["steps"] == 3
    assert tracked.weights == plain.weights
    assert "warning: train.report_to: mlflow" in capsys.readouterr().out
