"""Translate a line's schedule into the cron dialect of KFP's scheduler. It needs no kfp."""

from __future__ import annotations

from qlora_retrain.config import schedule
from qlora_retrain.config.schedule import ScheduleConfig
from qlora_retrain.core.errors import UsageError


def kfp_cron(section: ScheduleConfig) -> str:
    """Return a line's schedule as KFP's scheduler reads it: six fields, of which the first is the second.

    Its dialect has no 7 for Sunday, no range over the end such as `22-2` or `fri-mon`, and takes `*/2` for a star where
    two fields exclude each other. So every field becomes a star or a list of numbers.

    Raises:
        UsageError: For what only Airflow can do: other zones than UTC, new data, and some days.
    """
    if section.on_new_data:
        raise UsageError(
            "schedule.on_new_data: KFP starts runs only at times; set schedule.cron alone, or schedule this line with "
            "Airflow"
        )
    if section.time_zone != schedule.DEFAULT_ZONE:
        raise UsageError(
            f"schedule.time_zone: {section.time_zone}: KFP's scheduler is told no zone with a schedule and reads it in "
            "UTC; write schedule.cron in UTC, or schedule this line with Airflow"
        )
    expression = section.cron
    assert expression is not None, "a schedule without new data has times"
    fields, is_complete = schedule.expand(expression)
    if not is_complete:
        raise UsageError(
            f"schedule: {expression!r} names a last day, an n-th weekday (#) or a nearest weekday (W), which KFP's "
            "scheduler does not know; write the days of the month, or schedule this line with Airflow"
        )
    return " ".join(["0", *(",".join(map(str, sorted(field))) if field != ["*"] else "*" for field in fields)])
