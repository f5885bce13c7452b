"""A line's schedule is Airflow's: its times, the asset of its data, and the priority of its tasks."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config import schedule
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.runtimes.airflow import schedules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported


def line(section: str, name: str = "x1") -> LineConfig:
    return load(f"line: {name}\nsources: {{raw_data: file:///a, base_model: file:///b}}\nschedule: {section}\n")


def airflow_starts(section: str, after: datetime, count: int) -> list[datetime]:
    """The times at which Airflow's own timetable starts runs, as its scheduler asks for them."""
    import pendulum
    from airflow.serialization.encoders import coerce_to_core_timetable

    timetable: Any = coerce_to_core_timetable(schedules.dag_schedule(line(section)))
    times = [pendulum.instance(after)]
    for _ in range(count):
        times.append(timetable._get_next(times[-1]))
    return times[1:]


@pytest.mark.parametrize("cron", ["30 2 * * *", "0 3 * * 1", "15 * * * *", "*/20 1-3 * * *", "0 0 L * *", "@quarterly"])
@pytest.mark.parametrize(
    ("zone", "after"),
    [
        ("Europe/Berlin", datetime(2026, 3, 28, 20, tzinfo=UTC)),
        ("Europe/Berlin", datetime(2026, 10, 24, 20, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 10, 31, 20, tzinfo=UTC)),
        ("Australia/Lord_Howe", datetime(2026, 10, 3, 10, tzinfo=UTC)),
        ("UTC", datetime(2026, 3, 28, 20, tzinfo=UTC)),
    ],
)
def test_check_prints_the_times_at_which_airflow_starts_runs(cron: str, zone: str, after: datetime) -> None:
    expected = airflow_starts(f"{{cron: '{cron}', time_zone: {zone}}}", after, 12)
    # In UTC: Python takes no two times for equal, of which one is shown twice by a clock.
    assert [start.astimezone(UTC) for start in schedule.next_starts(cron, after, 12, zone)] == expected


@pytest.mark.parametrize("cron", ["{minute} {hour} * * {weekday}", "{minute} {hour} * * *"])
def test_a_line_that_is_switched_on_soon_after_a_start_waits_for_the_next(cron: str) -> None:
    """Airflow itself would also start the run of the last time: `make run` on a Monday then waited for that one."""
    from airflow.serialization.encoders import coerce_to_core_timetable
    from airflow.timetables.base import TimeRestriction

    now = datetime.now(UTC)
    last = now - timedelta(minutes=30)
    text = cron.format(minute=last.minute, hour=last.hour, weekday=last.isoweekday() % 7)
    timetable: Any = coerce_to_core_timetable(schedules.dag_schedule(line(f"'{text}'")))
    info = timetable.next_dagrun_info(
        last_automated_data_interval=None, restriction=TimeRestriction(earliest=None, latest=None, catchup=False)
    )
    assert info.run_after > now


def test_times_data_or_both_become_airflows_schedules() -> None:
    from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable

    assert schedules.dag_schedule(line("null")) is None
    text = schedules.dag_schedule(line("'0 3 * * 1'"))
    assert text == CronTriggerTimetable("0 3 * * 1", timezone="UTC", run_immediately=timedelta(0))
    times = schedules.dag_schedule(line("{cron: '0 3 * * 1', time_zone: Asia/Tokyo}"))
    assert times == CronTriggerTimetable("0 3 * * 1", timezone="Asia/Tokyo", run_immediately=timedelta(0))

    data = schedules.dag_schedule(line("{on_new_data: true, check_minutes: 3}"))
    assert isinstance(data, list)
    (asset,) = data
    assert isinstance(asset, Asset)
    assert (asset.name, asset.extra) == ("x1.raw_data", {"source": "file:///a"})
    path, arguments = asset.watchers[0].trigger.serialize()
    assert path == "qlora_retrain.runtimes.airflow.new_data.NewDataTrigger"
    assert arguments == {
        "asset": "x1.raw_data", "uri": "file:///a", "files": ["**"], "check_seconds": 180.0, "settle_seconds": 60.0
    }  # fmt: skip

    both = schedules.dag_schedule(line("{on_new_data: true, cron: '@daily', time_zone: Asia/Tokyo}"))
    assert isinstance(both, AssetOrTimeSchedule)
    assert both.timetable == CronTriggerTimetable("0 0 * * *", timezone="Asia/Tokyo", run_immediately=timedelta(0))


def test_lines_with_the_same_data_are_watched_apart() -> None:
    """Airflow takes equal triggers for one, with the assets of all; then none could keep what it saw last."""
    from airflow.serialization.encoders import encode_trigger
    from airflow.triggers.base import BaseEventTrigger

    triggers = [
        schedules.raw_data_asset(line("{on_new_data: true}", name)).watchers[0].trigger for name in ("x1", "x2")
    ]
    hashes = {BaseEventTrigger.hash(e["classpath"], e["kwargs"]) for e in map(encode_trigger, triggers)}
    assert len(hashes) == 2
    again = schedules.raw_data_asset(line("{on_new_data: true}")).watchers[0].trigger
    assert encode_trigger(again) == encode_trigger(triggers[0])  # at every parse the same


@pytest.mark.parametrize("section", ["{on_new_data: true}", "{on_new_data: true, cron: '@daily'}"])
def test_airflow_takes_the_schedule_from_its_database_as_it_is(section: str) -> None:
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization

    dag = DAG("x1", schedule=schedules.dag_schedule(line(section)), catchup=False)
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    (asset,) = [asset for _, asset in stored.timetable.asset_condition.iter_assets()]
    assert asset.watchers[0].trigger["kwargs"]["asset"] == "x1.raw_data"
    # Airflow offers no backfill where nothing is periodic, and refuses one over REST in its own words.
    assert stored.timetable.periodic == ("cron" in section)


def test_a_lines_priority_is_the_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert schedules.task_defaults("x1") == {"priority_weight": 1, "weight_rule": "absolute"}
    (tmp_path / "platform.yaml").write_text("priorities: {x1: 7}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
    weights = [schedules.task_defaults(name)["priority_weight"] for name in ("x1", "x2")]
    assert weights == [7, 1]


def test_runs_that_nobody_asked_for_need_new_rows() -> None:
    from types import SimpleNamespace

    from airflow.utils.types import DagRunType

    from qlora_retrain.runtimes.airflow.dag_run import is_started_by_schedule

    def started(run_type: object) -> bool:
        return is_started_by_schedule({"dag_run": SimpleNamespace(run_type=run_type)})  # type: ignore[typeddict-item]

    values = {run_type: started(run_type) for run_type in DagRunType}
    assert {run_type.value for run_type, is_scheduled in values.items() if is_scheduled} == {
        "scheduled", "asset_triggered", "backfill"
    }  # fmt: skip
    # The task sees the type as a text.
    assert all(started(a.value) == b for a, b in itertools.chain(values.items()))
