"""Choose the lines of a step's output that a task's log shows: all text, and of its progress what a person notices.

A step reports its progress several times a second, as JSON lines, and libraries draw bars. A run of a day would fill
the log with them. So of each kind of work the log shows the first report, the end, and one report every half minute.

Reports have the time at which the step made them. So a log that is copied at once, after the step, shows the same lines
as one that is copied while the step runs.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_retrain.core import endings, progress
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.progress import Update

EVERY_SECONDS = 30.0
# What tqdm draws: `Loading weights:  45%|####5     | 45/100 [00:01<00:01, 40.2it/s]`.
_BAR = re.compile(r"(?P<label>[^|%]{0,200}?)(?P<percent>\d{1,3})%\|[^|]{0,200}\|")


_LAST_LINES = 3
# Between the last lines of a step, of which the very last comes first.
BEFORE_THAT = "\nbefore that: "


@dataclass(frozen=True)
class StepOutput:
    """What a step's output says about its end.

    Attributes:
        ending: The ending that the step wrote; None where it was killed before.
        last_lines: The last lines of its other output, for a person; the very last one comes first.
    """

    ending: Ending | None
    last_lines: str


def copy_output(lines: Iterable[str], log: logging.Logger) -> StepOutput:
    """Copy a step's output to a task's log, except the ending and most reports of progress.

    Returns:
        The ending and the last lines, the very last one first, since that says most often what went wrong.
    """
    ending, last, step_log = None, deque[str](maxlen=_LAST_LINES), StepLog()
    for line in lines:
        text = line.rstrip()
        ending = endings.from_line(text) or ending
        visible = step_log.visible_text(text)
        if visible is None:
            continue
        log.info("%s", visible)
        # Progress would push out the lines that say what went wrong.
        if visible and progress.parse_update(text) is None:
            last.append(visible)
    return StepOutput(ending, BEFORE_THAT.join(reversed(last)))


class StepLog:
    """Decide line by line; one object for each copy of a step's output."""

    def __init__(self) -> None:
        # Of each kind of work and of its end, when the log last showed one.
        self._shown_at: dict[tuple[str, bool], float] = {}

    def visible_text(self, line: str) -> str | None:
        """Return a line as the log shows it; None where it is left out."""
        if endings.from_line(line):
            return None
        if update := progress.parse_update(line):
            is_end = update["done"] == update["total"]
            return describe(update) if self._is_due((str(update["what"]), is_end), _time_of(update)) else None
        # What was drawn over before is not on a screen either.
        text = line.rstrip("\r").rpartition("\r")[2]
        if bar := _BAR.match(text):
            return text if self._is_due((bar["label"].rstrip(), bar["percent"] == "100"), time.time()) else None
        return text

    def _is_due(self, work: tuple[str, bool], now: float) -> bool:
        shown_at = self._shown_at.get(work)
        # At the same instant: a line that is copied twice, since the copy before ended within a second.
        if shown_at is not None and 0 < now - shown_at < EVERY_SECONDS:
            return False
        self._shown_at[work] = now
        return True


def describe(update: Update) -> str:
    """Return a report of progress for a person: `training: 30 of 300 (10 %)  loss 0.41`."""
    done, total = update["done"], update["total"]
    assert isinstance(done, int | float)
    assert isinstance(total, int | float)
    share = f" ({100 * done / total:.0f} %)" if total else ""
    numbers = progress.format_numbers(progress.extra_numbers(update))
    return f"{update['what']}: {done:g} of {total:g}{share}  {numbers}".rstrip()


def _time_of(update: Update) -> float:
    """Return when a report was made; now where it does not say so as a number."""
    value = update.get("time")
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else time.time()
