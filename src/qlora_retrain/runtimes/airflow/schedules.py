"""Turn a line's schedule into what Airflow starts runs by: times, changes of the line's data, or both.

The data of a line is an asset of its own, `LINE.raw_data`. A trigger of ours (`new_data`) watches the files and emits
the asset's events. Whoever may create asset events can announce new data, too: by REST, or as the outlet of a task.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable

from qlora_retrain.config import platform, schedule
from qlora_retrain.config.line import LineConfig
from qlora_retrain.config.schedule import ScheduleConfig


def dag_schedule(config: LineConfig) -> CronTriggerTimetable | AssetOrTimeSchedule | list[Asset] | None:
    """Return the schedule of a line's DAG; None: it runs only when triggered."""
    section = config.schedule
    if section is None:
        return None
    times = timetable(section)
    if not section.on_new_data:
        return times
    assets = [raw_data_asset(config)]
    return assets if times is None else AssetOrTimeSchedule(timetable=times, assets=assets)


def timetable(section: ScheduleConfig) -> CronTriggerTimetable | None:
    """Turn the times of a schedule into a timetable; None where it has none."""
    # Airflow would find an error only after the import of the DAG file, and then drop every DAG in it.
    if section.cron is None:
        return None
    # A line that is switched on starts at its next time. By default Airflow also starts the run of the last time, while
    # less than a tenth of the interval has passed since: for a weekly line 17 hours.
    return CronTriggerTimetable(
        schedule.five_fields(section.cron), timezone=section.time_zone, run_immediately=timedelta(0)
    )


def raw_data_asset(config: LineConfig, check_seconds: float | None = None) -> Asset:
    """Return the asset of a line's data, with the trigger that watches its files.

    Each line has its own, also where lines read the same files: Airflow refuses two names for one URI, and lines may
    take other files of one folder.

    Args:
        config: The line.
        check_seconds: How often its files are looked at; None: as the line says.
    """
    # Imported only where a line uses it, because DAG files are parsed again and again.
    from airflow.sdk import AssetWatcher

    from qlora_retrain.runtimes.airflow.new_data import NewDataTrigger

    assert config.schedule is not None
    source, name = config.sources.raw_data, f"{config.line}.raw_data"
    check_seconds = check_seconds or config.schedule.check_minutes * 60.0
    trigger = NewDataTrigger(asset=name, uri=source.uri, files=list(source.files), check_seconds=check_seconds)
    return Asset(
        name=name,
        # With `x-` Airflow looks for no provider that knows the scheme, which takes longer than a hundred lines.
        uri=f"x-qlora-retrain://raw-data/{config.line}",
        group="raw_data",
        extra={"source": source.uri},
        watchers=[AssetWatcher(name=name, trigger=trigger)],
    )


def task_defaults(line: str) -> dict[str, Any]:
    """Return the priority of a line's tasks, for the DAG's `default_args`.

    It counts as it is. By Airflow's default rule a task's weight is the number of tasks behind it, so that the first
    task of any line would go before the last of the most urgent one.
    """
    return {"priority_weight": platform.load().priority_of(line), "weight_rule": "absolute"}
