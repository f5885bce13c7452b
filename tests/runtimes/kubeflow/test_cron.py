"""A line's schedule in KFP's dialect starts runs at the times at which Airflow does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from qlora_retrain.config import schedule
from qlora_retrain.config.schedule import ScheduleConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.kubeflow.cron import kfp_cron

START = datetime(2026, 1, 30, 12, 34, 56, tzinfo=UTC)


def kfp_times(expression: str, after: datetime) -> Iterator[datetime]:
    """The times at which KFP's scheduler fires, by the rules of robfig/cron, version 1, minute by minute."""
    bounds = [(0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6)]
    fields = expression.split()
    assert len(fields) == 6
    numbers, stars = [], []
    for field, (low, high) in zip(fields, bounds, strict=True):
        stars.append(field == "*")
        numbers.append(set(range(low, high + 1)) if field == "*" else {int(number) for number in field.split(",")})
        assert all(low <= number <= high for number in numbers[-1]), f"{field}: out of {low}-{high}"
    assert numbers[0] == {0}

    time = after.replace(second=0, microsecond=0)
    while True:
        time += timedelta(minutes=1)
        weekday = time.isoweekday() % 7  # Sunday is 0
        in_month, in_week = time.day in numbers[3], weekday in numbers[5]
        # Two fields of days exclude each other only where one of them is a star.
        is_day = in_month and in_week if stars[3] or stars[5] else in_month or in_week
        if not (is_day and time.month in numbers[4]):
            time = time.replace(hour=23, minute=59)
        elif time.hour in numbers[2] and time.minute in numbers[1]:
            yield time


@pytest.mark.parametrize(
    "expression",
    [
        "0 3 * * 1", "30 4 * * *", "@daily", "@weekly", "@monthly", "@yearly", "@hourly", "@quarterly", "@midnight",
        "0 3 * * 7", "0 3 * * sun", "0 3 * * MON-FRI", "0 3 * * fri-mon", "0 22-2 * * *", "*/15 9-17 * * 1-5",
        "0 3 */2 * 1", "0 3 1-31 * 1", "0 3 1,15 * *", "0 3 ? * 2", "5/20 * * * *", "0 3 * jan,JUL 1", "0 0 29 2 *",
        "0 3 * * 1-7", "0 3 13 * 5", "0 0 31 * *", "0 3 * 11-2 *",
    ],
)  # fmt: skip
def test_kfp_starts_runs_when_airflow_does(expression: str) -> None:
    count = 2 if "29 2" in expression else 40
    times = kfp_times(kfp_cron(ScheduleConfig(cron=expression)), START)
    assert [next(times) for _ in range(count)] == schedule.next_starts(expression, START, count)


def test_a_plain_schedule_stays_readable() -> None:
    assert kfp_cron(ScheduleConfig(cron="0 3 * * 1")) == "0 0 3 * * 1"
    assert kfp_cron(ScheduleConfig(cron="@daily")) == "0 0 0 * * *"


@pytest.mark.parametrize("expression", ["0 0 L * *", "0 0 1,L * *", "0 0 * * 1#2", "0 0 * * L5", "0 0 15W * *"])
def test_days_that_kfp_cannot_name_are_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="which KFP's scheduler does not know; write the days of the month"):
        kfp_cron(ScheduleConfig(cron=expression))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (ScheduleConfig(cron="0 3 * * 1", time_zone="Europe/Berlin"), "schedule.time_zone: Europe/Berlin: KFP's"),
        (ScheduleConfig(cron="0 3 * * 1", on_new_data=True), "schedule.on_new_data: KFP starts runs only at times"),
        (ScheduleConfig(on_new_data=True), "schedule.on_new_data: KFP starts runs only at times"),
    ],
)
def test_what_only_airflow_can_do_is_refused_by_name(section: ScheduleConfig, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        kfp_cron(section)
