"""A schedule is checked as the scheduler reads it, before the scheduler does."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from qlora_retrain.config import schedule
from qlora_retrain.config.line import LineConfig, document, load
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
        ("0 3 * *", "five fields: minute, hour, day of the month, month, day of the week; found 4"),
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
    assert load(f"{LINE}schedule: '{expression}'\n").schedule == schedule.ScheduleConfig(cron=expression)
    (time,) = schedule.next_starts(expression, datetime(2026, 2, 28, 12, tzinfo=UTC), 1)
    assert time.isoformat() == f"{expected}:00+00:00"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{cron: '@daily', time_zone: Europe/Berln}", "schedule.time_zone: 'Europe/Berln' is no .* mean Europe/Berlin"),
        ("{cron: '@daily', time_zone: europe/berlin}", "schedule.time_zone: .*did you mean Europe/Berlin"),
        ("{cron: '@daily', time_zone: ../../etc/passwd}", "schedule.time_zone: .* expected an IANA name"),
        ("{cron: '@daily', time_zone: Europe}", "schedule.time_zone: 'Europe' is no time zone"),
        ("{cron: '@daily', time_zone: ''}", "schedule.time_zone: '' is no time zone"),
        ("{cron: '99 3 * * 1'}", "schedule.cron: .*its minute is '99'"),
        ("{cron: '0 3 * * 1', time_zon: UTC}", "schedule.time_zon: unknown field; did you mean time_zone"),
        ("{cron: '0 3 * * 1', check_minutes: 5}", "schedule.check_minutes: has no effect without schedule.on_new_data"),
        ("{on_new_data: true, check_minutes: 0}", "schedule.check_minutes: .*greater than or equal to 1"),
        ("{on_new_data: true, check_minutes: 1441}", "schedule.check_minutes: .*less than or equal to 1440"),
        ("{on_new_data: true, time_zone: Europe/Berlin}", "schedule.time_zone: has no effect without schedule.cron"),
        ("{min_new_rows: 500}", "schedule: no run would ever start: set schedule.cron or schedule.on_new_data"),
        ("{on_new_data: false}", "schedule: no run would ever start"),
        ("{}", "schedule: no run would ever start"),
        ("{cron: '0 3 * * 1', min_new_rows: 0}", "schedule.min_new_rows: .*greater than or equal to 1"),
        ("5", "schedule: expected a cron expression, a section with cron or on_new_data, or null"),
        ("[a]", "schedule: expected a cron expression, a section"),
    ],
)  # fmt: skip
def test_a_section_that_says_nothing_or_nonsense_is_refused_with_its_field(section: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"the document:3: {words}"):
        load(f"{LINE}schedule: {section}\n")


def test_a_commit_of_the_hub_is_nothing_to_wait_for() -> None:
    commit = f"hf://owner/tickets@{'0' * 40}"
    line = f"line: x1\nsources: {{raw_data: '{commit}', base_model: file:///b}}\nschedule: {{on_new_data: true}}\n"
    with pytest.raises(UsageError, match=r"schedule\.on_new_data: sources\.raw_data is hf://.*, which never changes"):
        load(line)
    assert load(line, ["schedule={cron: '@daily'}"]).schedule == schedule.ScheduleConfig(cron="@daily")


def test_an_override_sets_a_field_beside_a_cron_that_is_written_alone() -> None:
    config = load(f"{LINE}schedule: '0 3 * * 1'\n", ["schedule.time_zone=Asia/Tokyo", "schedule.min_new_rows=7"])
    assert config.schedule == schedule.ScheduleConfig(cron="0 3 * * 1", time_zone="Asia/Tokyo", min_new_rows=7)
    assert load(f"{LINE}schedule: null\n", ["schedule.on_new_data=true"]).schedule is not None


def test_the_document_of_a_line_means_the_same_schedule() -> None:
    config = load(f"{LINE}schedule: {{cron: '0 3 * * 1', time_zone: Europe/Berlin}}\n")
    assert LineConfig.model_validate(document(config)) == config


def wall_clock_starts(zone: str, hour: int, minute: int, first: datetime, days: int) -> list[datetime]:
    """The moments of a daily time by a clock on the wall that is looked at every minute; of a day the last one."""
    starts: dict[str, datetime] = {}
    time = first
    skipped_on = set()
    while time < first + timedelta(days=days):
        clock = time.astimezone(ZoneInfo(zone))
        before = (time - timedelta(minutes=1)).astimezone(ZoneInfo(zone))
        if (clock.hour, clock.minute) == (hour, minute) and clock.date() not in skipped_on:
            starts[str(clock.date())] = time
        # The clock jumped over the time: it is as long after the jump as it would have been without it.
        jump = clock.replace(tzinfo=None) - before.replace(tzinfo=None) - timedelta(minutes=1)
        due = clock.replace(hour=hour, minute=minute, tzinfo=None)
        if jump > timedelta() and before.replace(tzinfo=None) < due < clock.replace(tzinfo=None):
            skipped_on.add(clock.date())
            starts[str(clock.date())] = time + (due - before.replace(tzinfo=None) - timedelta(minutes=1))
        time += timedelta(minutes=1)
    return sorted(starts.values())


@pytest.mark.parametrize(
    ("zone", "first"),
    [
        ("Europe/Berlin", datetime(2026, 3, 27, tzinfo=UTC)),  # on the 29th from 2:00 to 3:00
        ("Europe/Berlin", datetime(2026, 10, 23, tzinfo=UTC)),  # on the 25th from 3:00 to 2:00
        ("America/New_York", datetime(2026, 3, 6, 12, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 10, 30, 12, tzinfo=UTC)),
        ("Australia/Lord_Howe", datetime(2026, 4, 2, 18, tzinfo=UTC)),  # by half an hour
        ("Asia/Kolkata", datetime(2026, 3, 27, tzinfo=UTC)),  # never
    ],
)
@pytest.mark.parametrize(("hour", "minute"), [(2, 30), (2, 0), (1, 30), (3, 0), (23, 59)])
def test_a_zones_clock_gives_the_times(zone: str, first: datetime, hour: int, minute: int) -> None:
    expected = wall_clock_starts(zone, hour, minute, first + timedelta(minutes=1), 5)
    starts = schedule.next_starts(f"{minute} {hour} * * *", first, len(expected), zone)
    assert [start.astimezone(UTC) for start in starts] == expected
    assert all(start.tzinfo == ZoneInfo(zone) for start in starts)


def test_an_hourly_schedule_runs_every_hour_also_where_the_clock_shows_an_hour_twice() -> None:
    first = datetime(2026, 10, 24, 22, 45, tzinfo=UTC)
    starts = schedule.next_starts("30 * * * *", first, 6, "Europe/Berlin")
    assert [start.astimezone(UTC) - first for start in starts] == [timedelta(minutes=45 + 60 * i) for i in range(6)]
    assert [f"{start:%H:%M}" for start in starts] == ["01:30", "02:30", "02:30", "03:30", "04:30", "05:30"]


def test_check_says_what_starts_runs() -> None:
    section = schedule.ScheduleConfig(cron="0 3 * * 1", time_zone="Europe/Berlin", on_new_data=True, min_new_rows=1500)
    assert list(schedule.describe(section, datetime(2026, 3, 20, tzinfo=UTC))) == [
        "its next runs start at Mon 2026-03-23 03:00, Mon 2026-03-30 03:00, Mon 2026-04-06 03:00 (Europe/Berlin)",
        "Airflow looks at sources.raw_data every 10 minutes; other files there start a run",
        "such a run ends as unchanged with fewer than 1,500 rows more than production's",
    ]
