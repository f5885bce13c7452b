"""Jobs of a lab: one that fails says so with its step's own words, and stops no other."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_retrain.core import graph
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.plans import LabPlanner
from qlora_retrain.lab.runs import Job, run_jobs

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Undo what `run_jobs` does to this process's signal handlers."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_jobs_that_fail_stop_no_other_and_say_why(
    line: Path, root_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its file of rows is gone, so the first step ends before it imports anything.
    planner = LabPlanner.for_line(line, root_uri, (), 0.1, datetime(2026, 1, 31, tzinfo=UTC))
    points = [Point((("train.rank", rank),)) for rank in (4, 8)]
    plans = planner.write([planner.plan(planner.resolve(point)) for point in points])
    (line.parent / "tickets.jsonl").unlink()
    step = graph.producer_name("dataset")
    # Both miss the same data set, so the second one waits for the first.
    outcomes = run_jobs([Job(p.label, plan, step) for p, plan in zip(points, plans, strict=True)], 2, tmp_path / "logs")

    assert [outcome.code for outcome in outcomes] == [13, 13]
    assert all(outcome.message.startswith(f"{step}: integrity or security (13): ") for outcome in outcomes)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"{plan.run_id}-{step}.log" for plan in plans}
    printed = capsys.readouterr()
    assert printed.out == ""
    labels = [line.partition(":")[0] for line in printed.err.split("\n") if line]
    assert labels == sorted(labels)
    assert set(labels) == {"1/2 rank 4", "2/2 rank 8"}
    assert "2/2 rank 8: validate_data: integrity or security (13)" in printed.err
