"""A run of the schedule needs new rows; a run by hand does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core.errors import DataRefused
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import explain, make_plan, new_rows, run_page, status
from qlora_retrain.pipeline.new_rows import MinNewRows
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.store import Store

RunAll = Callable[[Plan], dict[str, int]]
SCHEDULE = 'schedule={cron: "0 3 * * 1", min_new_rows: 5}'
ROWS = 30  # of the line in `conftest.py`


@pytest.fixture
def plan_with(line: Path, root_uri: str) -> Callable[..., Plan]:
    """Plan a run after so many rows were added to the data; a negative number removes some."""

    def plan(new: int = 0, *, by_schedule: bool = True) -> Plan:
        data = line.parent / "tickets.jsonl"
        rows = data.read_bytes().splitlines(keepends=True)[: ROWS + min(new, 0)]
        data.write_bytes(b"".join(rows + [json.dumps({"new": i}).encode() + b"\n" for i in range(new)]))
        return make_plan.make_plan(line, root_uri, overrides=[SCHEDULE], is_started_by_schedule=by_schedule)

    return plan


def production(store: Store) -> str:
    alias, _ = registry.read_alias(store, "intents", "production")
    assert alias is not None
    return alias.version


def test_a_run_of_the_schedule_with_too_few_new_rows_ends_after_they_were_counted(
    plan_with: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    run_all(plan_with())
    before = production(store)
    plan = plan_with(3)
    assert plan.min_new_rows == MinNewRows(minimum=5, production_rows=ROWS)
    rule = "production was made from 30 rows; with fewer than 5 more, the run ends after validate_data as unchanged"
    assert rule in explain.as_text(plan)
    assert status.exit_code(plan, "train_qlora") is None

    assert set(run_all(plan).values()) == {0}
    assert status.find_manifest(plan, "train_qlora") is None
    assert status.find_manifest(plan, "publish") is None
    assert production(store) == before
    reason = "too little new data: 3 new rows, schedule.min_new_rows is 5"
    assert status.nothing_to_do(plan) == f"unchanged: {reason}"
    assert f"unchanged: {reason}" in explain.status_text(plan)
    assert run_page.sentence(plan) == f"Nothing changed: {reason}."
    assert {status.exit_code(plan, step.name) for step in plan.steps} == {0}

    # A week later nothing more has come: the plan itself knows it.
    assert f"unchanged: {reason}; nothing will run" in explain.as_text(plan_with(3))


@pytest.mark.parametrize(("new", "by_schedule"), [(5, True), (4, False), (1, False)])
def test_enough_new_rows_or_a_person_start_the_training(
    plan_with: Callable[..., Plan], run_all: RunAll, store: Store, new: int, by_schedule: bool
) -> None:
    run_all(plan_with())
    before = production(store)
    plan = plan_with(new, by_schedule=by_schedule)
    assert set(run_all(plan).values()) == {0}
    assert status.nothing_to_do(plan) is None
    assert production(store) != before


def test_fewer_rows_than_productions_are_no_new_ones(plan_with: Callable[..., Plan], run_all: RunAll) -> None:
    run_all(plan_with())
    plan = plan_with(-7)
    run_all(plan)
    assert new_rows.too_few(plan) == (
        "too little new data: 0 new rows (7 fewer than production's), schedule.min_new_rows is 5"
    )


def test_a_line_without_a_version_in_production_needs_no_new_rows(
    plan_with: Callable[..., Plan], run_all: RunAll
) -> None:
    plan = plan_with()
    assert plan.min_new_rows is None
    assert "min_new_rows" not in json.loads(plan.to_bytes())  # as in the plans of earlier releases
    assert set(run_all(plan).values()) == {0}


def test_refused_data_stays_refused(
    plan_with: Callable[..., Plan], run_all: RunAll, small_steps: dict[str, Callable[..., StepResult]]
) -> None:
    run_all(plan_with())
    accepting = small_steps["validate_data"]

    def refusing(
        config: object, raw_data: Path, base_model: Path, golden_data: Path | None, reference_profile: Path | None,
        eval_data: Path | None, evaluation_history: Path | None, replay_data: Path | None,
        reference_data: Path | None, dataset: Path,
    ) -> StepResult:  # fmt: skip
        result = accepting(
            config, raw_data, base_model, golden_data, reference_profile, eval_data, evaluation_history, replay_data,
            reference_data, dataset,
        )  # fmt: skip
        return StepResult(result.numbers, refused=DataRefused("it is all one label"))

    small_steps["validate_data"] = refusing
    plan = plan_with(3)
    assert run_all(plan) == {"validate_data": 10}
    assert new_rows.too_few(plan) is None
    assert status.exit_code(plan, "train_qlora") is None


def test_a_version_that_does_not_say_its_rows_sets_no_minimum(
    plan_with: Callable[..., Plan], run_all: RunAll, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(plan_with())
    release = registry.read_release(open_store(store.uri), "intents", production(store))
    older = release.model_copy(update={"numbers": {"dataset": {"rows_train": 27}}})
    from qlora_retrain.config.schedule import ScheduleConfig

    schedule = ScheduleConfig(cron="@weekly", min_new_rows=5)
    assert new_rows.resolve(schedule, older, is_scheduled=True) is None
    assert "does not say how many rows it read" in capsys.readouterr().out
    assert new_rows.resolve(schedule, release, is_scheduled=False) is None
    assert "started by hand, so schedule.min_new_rows does not count, which is 5" in capsys.readouterr().out
