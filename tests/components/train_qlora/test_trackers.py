"""Trackers that also get the losses, from the process that trains: a real MLflow that keeps them in a file."""

import json
import os
import sqlite3

import pytest

from qlora_retrain.pipeline.code_identity import project_root

TRACKERS = project_root() / ".state" / "trackers"


@pytest.mark.slow
def test_mlflow_gets_every_step_once_also_of_a_run_that_was_stopped(step, program, monkeypatch, tmp_path):
    if not (TRACKERS / "mlflow").is_dir():
        missing = "MLflow is not installed: make tracker-setup"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    monkeypatch.syspath_prepend(TRACKERS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run, settings = step(), {"report_to": ["mlflow"], "max_steps": 4, "evaluations": 2}
    code, _, errors = program(run, max_hours=1e-9, **settings).ended()
    assert code == 75, errors
    code, _, errors = program(run, **settings).ended()
    assert code == 0, errors
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        losses = database.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
        measured = database.execute("SELECT step, value FROM metrics WHERE key = 'eval_loss' ORDER BY step").fetchall()
    steps = [json.loads(line) for line in (run.adapter / "loss.jsonl").read_text().splitlines()]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in steps]
    assert measured == [(number, pytest.approx(loss)) for number, loss in run.papers["evaluation_losses"]]
