"""How long each task may take, and which setting the message names."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest

from qlora_retrain.config.line import load
from qlora_retrain.core import endings, graph
from qlora_retrain.core.endings import Kind
from qlora_retrain.core.errors import Cause
from qlora_retrain.pipeline import make_plan, run_endings, step_main
from qlora_retrain.runtimes import deadlines
from qlora_retrain.storage import open_store

TASKS = ("plan", *(step.name for step in graph.STEPS))


@pytest.mark.parametrize(("override", "expected_hours"), [("null", 168 + 2), ("3", 3 + 2), ("200", 200 + 2)])
def test_training_has_its_budget_and_time_to_fetch_and_every_other_task_the_lines_hours(
    line: Path, root_uri: str, override: str, expected_hours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "platform.yaml").write_text("runtime: {max_step_hours: 5}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
    config = load(line, [f"train.max_hours={override}"])
    hours = {task: deadlines.line_timeout(config, task) / timedelta(hours=1) for task in TASKS}
    assert hours == {task: expected_hours if task == "train_qlora" else 5 for task in TASKS}
    # A run by hand may have more than the line, and the run as a whole must wait for it.
    assert deadlines.run_timeout(config) == timedelta(hours=6 * 5 + max(expected_hours, 170))

    # The plan's budget counts, since the form may have changed it.
    plan = make_plan.make_plan(line, root_uri, overrides=["train.max_hours=7"])
    planned = {s.name: deadlines.planned_timeout(plan, s.name, timedelta(hours=5)) for s in graph.STEPS}
    assert planned == {s.name: timedelta(hours=9 if s.scratch else 5) for s in graph.STEPS}


@pytest.mark.parametrize("task", TASKS)
def test_a_deadline_that_passed_names_its_setting_and_is_not_tried_again(task: str) -> None:
    ending = deadlines.ending(task, timedelta(hours=1.5))
    assert (ending.code, ending.kind, ending.retry, ending.cause) == (12, Kind.ERROR, False, Cause.TIME_BUDGET)
    assert "after 1.5 hours" in ending.reason
    assert ("train.max_hours" if task == "train_qlora" else "runtime.max_step_hours") in ending.reason


def test_a_step_that_hangs_in_native_code_writes_its_ending_before_its_process_ends(
    line: Path, root_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan.make_plan(line, root_uri)

    def stop(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", stop)
    with pytest.raises(SystemExit) as ended:
        step_main._end_process(plan, "validate_data", tmp_path / "ending", "a pattern searches too long")
    ending = run_endings.read(open_store(plan.root), plan.run_id, "validate_data")
    assert ending == endings.from_json((tmp_path / "ending").read_text())
    assert ending is not None
    assert (ended.value.code, ending.code, ending.kind) == (12, 12, Kind.ERROR)
    assert ending.reason == "a pattern searches too long"
