"""Trackers that also get the losses, from the training process: a real MLflow that keeps them in a file."""

import json
import os
import sqlite3

import pytest

from qlora_retrain.pipeline.code_identity import project_root

TRACKERS = project_root() / ".state" / "trackers"


@pytest.mark.slow
def test_mlflow_gets_every_step_once_even_of_a_run_that_was_stopped_and_resumed(step, program, monkeypatch, tmp_path):
    if not (TRACKERS / "mlflow").is_dir():
        missing = "MLflow is not installed: make tracker-setup"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    monkeypatch.syspath_prepend(TRACKERS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run, settings = step(), {"report_to": ["mlflow"], "max_steps": 4, "num_evals": 2}

    # The budget is used up after one step, and the second attempt trains the rest. Both are fresh processes: a forked
    # one would not look for packages in PYTHONPATH.
    exit_code, _, stderr = program(run, fresh=True, max_hours=1e-9, **settings).finish()
    assert exit_code == 12, stderr
    exit_code, _, stderr = program(run, fresh=True, **settings).finish()
    assert exit_code == 0, stderr

    # Read from the tracker's database, not through its client.
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        losses = database.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
        eval_losses = database.execute(
            "SELECT step, value FROM metrics WHERE key = 'eval_loss' ORDER BY step"
        ).fetchall()

    steps = [json.loads(line) for line in (run.adapter / "loss.jsonl").read_text().splitlines()]
    assert losses == [(entry["step"], pytest.approx(entry["loss"])) for entry in steps]
    assert eval_losses == [(number, pytest.approx(loss)) for number, loss in run.document["evaluation_losses"]]
