"""A line's schedule: its section, and its times as the scheduler computes them, by the library that it uses."""

from __future__ import annotations

import difflib
import re
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from typing import Any

from pydantic import field_validator, model_validator

from qlora_retrain.config.fields import Section, operational

DEFAULT_ZONE = "UTC"

# Airflow's own names, which are cron expressions; croniter lacks the last.
PRESETS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@quarterly": "0 0 1 */3 *",
}
_SIZES = (59, 23, 31, 12, 7)  # the longest step of each field that has an effect
# Airflow puts a schedule into words, and its database has room for 1,000 characters of them.
_MAX_CHARACTERS = 120
_SHOWN_STARTS = 3
FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")


class ScheduleConfig(Section):
    """When runs of a line start by themselves; a text alone is its `cron`."""

    cron: str | None = operational(None, "five fields as Airflow reads them, or a name such as @daily; null: no times")
    time_zone: str = operational(DEFAULT_ZONE, "the zone of cron, by its IANA name, e.g. Europe/Berlin")
    on_new_data: bool = operational(False, "Airflow: start a run, too, when the files of sources.raw_data change")
    check_minutes: int = operational(10, "on_new_data: how often the files are looked at", ge=1, le=1440)
    min_new_rows: int | None = operational(
        None,
        "a run of the schedule ends as unchanged where raw_data has fewer rows more than production's version read; "
        "null: none. A run by hand trains all the same",
        ge=1,
    )

    @field_validator("cron")
    @classmethod
    def _has_a_next_time(cls, value: str | None) -> str | None:
        if value is not None:
            five_fields(value)
        return value

    @field_validator("time_zone")
    @classmethod
    def _is_a_zone(cls, value: str) -> str:
        zone(value)
        return value

    @model_validator(mode="after")
    def _starts_runs(self) -> ScheduleConfig:
        if self.cron is None and not self.on_new_data:
            raise ValueError(
                "no run would ever start: set schedule.cron or schedule.on_new_data, or write schedule: null"
            )
        if self.cron is None and "time_zone" in self.model_fields_set:
            raise ValueError("schedule.time_zone: has no effect without schedule.cron; leave it out")
        if not self.on_new_data and "check_minutes" in self.model_fields_set:
            raise ValueError("schedule.check_minutes: has no effect without schedule.on_new_data: true; leave it out")
        return self


def expand_short_form(value: Any) -> Any:
    """Return a schedule that is written as a cron expression alone in its long form."""
    if value is not None and not isinstance(value, str | dict | ScheduleConfig):
        raise ValueError("expected a cron expression, a section with cron or on_new_data, or null")
    if not isinstance(value, str):
        return value
    # Here, so that a fault of it is one of `schedule`: nobody wrote `schedule.cron`.
    five_fields(value)
    return {"cron": value}


def zone(name: str) -> tzinfo:
    """Return the time zone of an IANA name.

    Raises:
        ValueError: If there is none of that name.
    """
    # Known without a database of zones, which a small image may not have.
    if name == DEFAULT_ZONE:
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    # A folder of the database is an OSError, and a path out of it a ValueError.
    except (zoneinfo.ZoneInfoNotFoundError, OSError, ValueError):
        pass
    names = {name.lower(): name for name in zoneinfo.available_timezones()}
    if not names:
        raise ValueError(f"{name!r} cannot be looked up: this machine has no time zones; install the package tzdata")
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.8)
    hint = f"; did you mean {names[near[0]]}?" if near else ""
    raise ValueError(f"{name!r} is no time zone; expected an IANA name such as Europe/Berlin{hint}")


# A line's schedule is asked for it several times, and Airflow parses all lines twice a minute.
@lru_cache(maxsize=1024)
def five_fields(expression: str) -> str:
    """Return the expression as five fields that have a next time.

    Raises:
        ValueError: If the scheduler would not understand it, or would never start a run.
    """
    from croniter import CroniterBadDateError, CroniterError

    text = " ".join(expression.split())
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"expected at most {_MAX_CHARACTERS} characters, found {len(text):,}; write ranges and steps")
    if text.startswith("@"):
        if text.lower() not in PRESETS:
            raise ValueError(f"{expression!r} is no name of a schedule; expected one of {', '.join(PRESETS)}")
        return PRESETS[text.lower()]

    fields = text.split(" ")
    if len(fields) != len(FIELDS):
        raise ValueError(
            f"a cron expression has five fields: {', '.join(FIELDS)}; found {len(fields)} in {expression!r}"
        )
    # croniter would take another random time whenever the scheduler reads the line.
    if random_field := next((field for field in fields if re.search(r"(^|,)[RH](\W|$)", field, re.IGNORECASE)), None):
        raise ValueError(f"{random_field!r} in {expression!r} stands for a random time; write the time itself")

    for field, name, size in zip(fields, FIELDS, _SIZES, strict=True):
        steps = [int(step) for step in re.findall(r"/(\d+)", field)]
        # croniter takes it, and starts runs at the range's first number alone.
        if too_long := [step for step in steps if step > size]:
            raise ValueError(
                f"the step of {field!r} in {expression!r} is longer than the {name} is: there would be no run after "
                f"every {too_long[0]}, but one at the first {name} alone"
            )

    try:
        next_starts(text, datetime(2026, 1, 1), 1)
    except CroniterBadDateError as error:
        raise ValueError(f"{expression!r} names a day that no year has, so no run would ever start") from error
    except (CroniterError, ValueError) as error:
        raise ValueError(f"{expression!r} is not a cron expression{_wrong_field(fields)}") from error
    return text


def next_starts(expression: str, after: datetime, count: int, time_zone: str = DEFAULT_ZONE) -> list[datetime]:
    """Return the next times at which the scheduler starts a run, in the time zone.

    On the days on which clocks change, it does as Airflow: a time that the clock skips is an hour later by the clock,
    and a time that it shows twice is the second one. A schedule of every hour runs every hour.
    """
    from croniter import croniter

    local, fields = zone(time_zone), PRESETS.get(expression.lower(), expression)
    time, starts = after.astimezone(local) if after.tzinfo else after.replace(tzinfo=local), []
    for _ in range(count):
        wall_time = time.replace(tzinfo=None)
        times = croniter(fields, wall_time)
        next_wall_time = times.get_next(datetime)
        if times.expanded[1] == ["*"]:
            start = time.astimezone(UTC) + (next_wall_time - wall_time)
        else:
            start = max(next_wall_time.replace(tzinfo=local, fold=fold).astimezone(UTC) for fold in (0, 1))
        time = start.astimezone(local)
        starts.append(time)
    return starts


def describe(section: ScheduleConfig, now: datetime) -> Iterator[str]:
    """Yield a sentence for each thing that starts runs, and for what they need."""
    # The times show what the expression means: `0 0 1 * 1` is every first of the month and every Monday.
    if section.cron is not None:
        times = next_starts(section.cron, now, _SHOWN_STARTS, section.time_zone)
        listed = ", ".join(f"{time:%a %Y-%m-%d %H:%M}" for time in times)
        yield f"its next runs start at {listed} ({section.time_zone})"
    if section.on_new_data:
        yield f"Airflow looks at sources.raw_data every {section.check_minutes} minutes; other files there start a run"
    if section.min_new_rows is not None:
        yield f"such a run ends as unchanged with fewer than {section.min_new_rows:,} rows more than production's"


def expand(expression: str) -> tuple[list[list[Any]], bool]:
    """Return the numbers of each field, `*` for all of them, and whether the fields say everything.

    They do not where a day is the last one, or the n-th weekday, or the weekday nearest to a day of the month.
    """
    from croniter import croniter

    parsed = croniter(five_fields(expression))
    has_last_day = any("l" in field for field in parsed.expanded)
    return parsed.expanded, not (has_last_day or parsed.nth_weekday_of_month or parsed.nearest_weekday)


def _wrong_field(fields: list[str]) -> str:
    """Return a clause that names the first field that is wrong by itself; empty where each of them is right."""
    from croniter import croniter

    for i, name in enumerate(FIELDS):
        alone = ["*"] * len(FIELDS)
        alone[i] = fields[i]
        if not croniter.is_valid(" ".join(alone)):
            return f": its {name} is {fields[i]!r}"
    return ""
