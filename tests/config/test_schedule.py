"""A schedule is checked as the scheduler reads it, before the scheduler does."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest

from qlora_retrain.config import schedule
from qlora_retrain.config.line import load
from qlora_retrain.core.errors import UsageError

LINE = "line: x1\nsources: {raw_data: file:///a, base_model: file:///b}\n"


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("99 3 * * *", "is not a cron expression: its minute is '99'"),
        ("0 24 * * *", "its hour is '24'"),
        ("0 3 32 * *", "its day of the month is '32'"),
        ("0 3 0 * *", "its day of the month is '0'"),
        ("0 3 * 13 *", "its month is '13'"),
        ("0 3 * * 8", "its day of the week is '8'"),
        ("0 3 * * monday", "its day of the week is 'monday'"),
        ("0 3 ** * *", "its day of the month is '**'"),
        ("٣ 3 * * *", "its minute is '٣'"),
        ("-1 3 * * *", "its minute is '-1'"),
        ("*/0 3 * * *", "its minute is '*/0'"),
        ("0 0 31 2 *", "names a day that no year has"),
        ("0 0 30 2 *", "names a day that no year has"),
        ("0 0 31 4,6,9,11 *", "names a day that no year has"),
        ("*/90 * * * *", "the step of '*/90' in '*/90 * * * *' is longer than the minute is"),
        ("0 */48 * * *", "is longer than the hour is"),
        ("@sometimes", "'@sometimes' is no name of a schedule; expected one of @hourly, @daily"),
        ("@reboot", "is no name of a schedule"),
        ("@once", "is no name of a schedule"),
        ("@every 1h", "is no name of a schedule"),
        ("0 3 * *", "five fields, in UTC: minute, hour, day of the month, month, day of the week; found 4"),
        ("0 0 3 * * 1", "found 6"),
        ("0 0 3 * * 1 2026", "found 7"),
        ("", "five fields"),
        ("R R * * *", "stands for a random time"),
        ("0 H * * *", "stands for a random time"),
    ],
)
def test_a_schedule_that_never_runs_or_is_none_is_refused_with_its_fault(expression: str, words: str) -> None:
    with pytest.raises(UsageError, match="schedule: .*" + re.escape(words)):
        load(f"{LINE}schedule: '{expression}'\n")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0 3 * * 1", "2026-03-02T03:00"),
        ("@daily", "2026-03-01T00:00"),
        ("@DAILY", "2026-03-01T00:00"),
        ("@quarterly", "2026-04-01T00:00"),
        ("0 3 * * mon", "2026-03-02T03:00"),
        ("0 3 * jun SUN", "2026-06-07T03:00"),
        ("0 3 * * 7", "2026-03-01T03:00"),
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 22-2 * * *", "2026-02-28T22:00"),
        # Either day, where both are given: a Monday of February is no 31st.
        ("0 0 31 2 1", "2027-02-01T00:00"),
        ("0 0 L * *", "2026-03-31T00:00"),
        ("  0   3 * * *  ", "2026-03-01T03:00"),
    ],
)
def test_a_schedule_has_its_next_time(expression: str, expected: str) -> None:
    assert load(f"{LINE}schedule: '{expression}'\n").schedule == expression
    (time,) = schedule.next_starts(expression, datetime(2026, 2, 28, 12, tzinfo=UTC), 1)
    assert time.isoformat() == f"{expected}:00+00:00"
