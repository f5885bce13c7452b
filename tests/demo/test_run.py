"""`make run`: after Ctrl-C no process is left; the next run says which step failed, why, and where its log is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qlora_retrain.config.line import load
from qlora_retrain.demo import run
from qlora_retrain.demo.airflow_api import TaskState
from qlora_retrain.demo.progress_board import ProgressBoard
from qlora_retrain.pipeline import make_plan


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "QLORA_RETRAIN_PIPELINES": str(folder / "pipelines"),
        "QLORA_RETRAIN_ROOT": (folder / "store").as_uri(),
    }
    command = [sys.executable, "-m", "qlora_retrain.demo.run", "--line", "tickets", "--home", str(folder / "home")]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.airflow
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ctrl_c_ends_everything_and_the_next_run_says_what_failed(
    tmp_path: Path, tickets: Path, tiny_model: Path
) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "tickets.yaml").write_text(
        f"line: tickets\nsources: {{raw_data: {tickets}, base_model: {tiny_model}}}\ndata: {{min_train_rows: 100000}}\n"
    )
    with start(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"  (validate_data|quantize_model) +running", line):
                break
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert "run the same command again to continue" in process.stdout.read()
        assert process.wait(300) == run.INTERRUPTED
        assert [p for p in descendants if is_alive(p)] == []

    with start(tmp_path, "--param", "train.rank=0") as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 12
    assert re.search(r"make run: Airflow refused .*minimum of 1", output)

    with start(tmp_path) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 10
    assert re.search(r"failed +validate_data \(try 1\): data refused \(10\): ", output)
    log = re.search(r"log +(/.*attempt=1\.log)", output)
    assert log is not None
    assert "data refused (10)" in Path(log[1]).read_text()
    assert re.search(r"  train_qlora +not run", output)


def asset_events(folder: Path) -> list[str]:
    """List the versions that asset events named, from Airflow's database."""
    with contextlib.closing(sqlite3.connect(folder / "home" / "airflow.db")) as database:
        return [json.loads(extra)["version"] for (extra,) in database.execute("select extra from asset_event")]


@pytest.mark.airflow
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_publishes_pulls_and_asks_and_the_next_finds_nothing_changed(
    tmp_path: Path, tickets: Path, tiny_model: Path
) -> None:
    (tmp_path / "pipelines").mkdir()
    golden = tmp_path / "golden.jsonl"
    golden.write_text("\n".join(tickets.read_text().split("\n")[:12]) + "\n")
    (tmp_path / "pipelines" / "tickets.yaml").write_text(
        "line: tickets\n"
        f"sources: {{raw_data: {tickets}, base_model: {tiny_model}, golden_data: {golden}}}\n"
        "data: {task: labels, system: Name the intent., eval_fraction: 0.2, max_length_tokens: 256}\n"
        "train: {learning_rate: 5e-3, epochs: 10, micro_batch_size: 16, dropout: 0.0, rank: 8}\n"
        "evaluate: {allow_first_release: true, min_gain_over_base: 0.1, bootstrap_samples: 500, "
        "text_in_reports: true}\n"
        "merge: {max_loss_increase_nats: 0.5, min_prompts: 10}\n"
    )
    with start(tmp_path) as process:
        output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output

    alias = json.loads((tmp_path / "store/models/tickets/aliases/production.json").read_text())
    version = alias["version"]
    assert f"version   tickets@production is {version}\n" in output
    assert f"folder    {tmp_path}/store/models/tickets/versions/{version}\n" in output
    evaluation = json.loads(
        (tmp_path / f"store/models/tickets/versions/{version}/evaluation/evaluation.json").read_text()
    )
    assert f"verdict   {evaluation['sentence']}\n" in output

    reports = re.findall(r"report    (.*)", output)
    assert len(reports) == 4
    assert all(Path(r).is_file() for r in reports)

    answers = re.findall(
        r'^(right|wrong)     (eval|golden): "(.*)"\n          (\w+)(?:  \(expected: (\w+)\))?$', output, re.M
    )
    assert [kind for _, kind, _, _, _ in answers] == ["eval"] * 4 + ["golden"] * 2
    rows = [json.loads(line)["messages"] for line in tickets.read_text().split("\n") if line]
    # A question is printed in one line.
    expected = {" ".join(turns[0]["content"].split()): turns[1]["content"] for turns in rows}
    for word, _, question, answer, corrected in answers:
        assert (word == "right") is (answer == expected[question])
        assert corrected in ("", expected[question])

    right = sum(word == "right" for word, *_ in answers)
    evaluation_accuracy = f"{evaluation['contestants']['challenger']['accuracy']:.1%} of "
    assert f"in all    {right} of 6 right; by the evaluation {evaluation_accuracy}" in output
    assert re.search(r"^base      to the first: ", output, flags=re.MULTILINE)

    assert asset_events(tmp_path) == [version]

    with start(tmp_path) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert asset_events(tmp_path) == [version], "an event without a new version"
    assert f"nothing changed: production is already {version}\n" in output
    log_files = list((tmp_path / "store/runs").glob("*/logs/*"))
    assert {p.parents[1] for p in log_files} == {min((tmp_path / "store/runs").iterdir())}, (
        "the second run started a step"
    )


def test_away_from_a_terminal_a_line_is_printed_when_a_state_changes(capsys: pytest.CaptureFixture[str]) -> None:
    board = ProgressBoard()
    waiting = [TaskState("plan", "running", 1, 1.0), TaskState("publish", None, 0, 0.0)]
    board.show(waiting)
    board.show(waiting)
    board.show([TaskState("plan", "success", 2, 3.2), TaskState("publish", "scheduled", 0, 0.0)])
    assert capsys.readouterr().out == "  plan            running         1 s\n  plan            done (try 2)      3 s\n"


def test_no_row_is_shown_where_the_line_does_not_allow_text(
    tmp_path: Path, line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan.make_plan(line, (tmp_path / "store").as_uri())
    run.print_answers(plan, load(line), tmp_path, {})
    assert capsys.readouterr().out == ""
