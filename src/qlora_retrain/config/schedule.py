"""Read a line's schedule as the scheduler will: a cron expression of Airflow, in UTC, by the library that it uses."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

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
FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")


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
            f"a cron expression has five fields, in UTC: {', '.join(FIELDS)}; found {len(fields)} in {expression!r}"
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


def next_starts(expression: str, after: datetime, count: int) -> list[datetime]:
    """Return the next times at which the scheduler starts a run."""
    from croniter import croniter

    times = croniter(PRESETS.get(expression.lower(), expression), after)
    return [times.get_next(datetime) for _ in range(count)]


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
