"""Progress of long work: a bar on a terminal, JSON lines anywhere else, and callbacks for subscribers.

Runtimes, the run page and the processes of a training step parse the JSON lines, so their fields (`time`, `what`,
`done`, `total`) are a format and not free text.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from qlora_retrain.core import json_depth, visible_text
from qlora_retrain.core.outcome import Number

Update = Mapping[str, Number]
_BAR_WIDTH = 28
_MAX_COUNT = 1e18
_subscribers: list[Callable[[Update], None]] = []


@contextlib.contextmanager
def subscribe(callback: Callable[[Update], None]) -> Iterator[None]:
    """Send every update that is made inside the block to `callback` too."""
    _subscribers.append(callback)
    try:
        yield
    finally:
        _subscribers.remove(callback)


def say(text: str) -> None:
    """Print one line for a person."""
    # Flushed, because a process that is killed loses what is still in its buffer.
    print(text, flush=True)


def update(label: str, done: float, total: float, **numbers: Number) -> None:
    """Report how far the work is, e.g. `update("training", 30, 300, loss=0.41)`.

    Args:
        label: The work, in a word or two.
        done: Units finished; equal to `total` on the last call.
        total: Units in all.
        numbers: Measurements so far, with units in their names.
    """
    record: dict[str, Number] = {"what": label, "done": done, "total": total, **numbers}
    for callback in _subscribers:
        callback(record)

    if sys.stdout.isatty():
        filled = round(_BAR_WIDTH * min(1.0, done / total)) if total else _BAR_WIDTH
        bar = "█" * filled + "·" * (_BAR_WIDTH - filled)
        # \r and \x1b[K redraw the bar in place; the last update ends the line.
        line = f"\r{label:<12} {bar} {done:g}/{total:g}  {format_numbers(numbers)}\x1b[K"
        visible_text.write_controls(f"{line}\n" if done >= total else line)
    else:
        print(json.dumps({"time": round(time.time(), 1), **record}), flush=True)


def parse_update(line: str) -> Update | None:
    """Return the update that another process printed, or None for any other line."""
    # Most lines of a log are text, so the first characters are compared before JSON is parsed.
    if not line.startswith('{"time"'):
        return None
    return from_json(line)


def from_json(text: str | bytes) -> Update | None:
    """Return the update in a JSON document; None where it is none, whatever somebody else has put there."""
    try:
        record = json_depth.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("what"), str):
        return None
    # A number and no text, since it is formatted as one: not NaN, nor an int that is too large for a float.
    counts = (record.get("done"), record.get("total"))
    is_update = all(isinstance(count, int | float) and -_MAX_COUNT < count < _MAX_COUNT for count in counts)
    return record if is_update else None


def describe(record: Update) -> str:
    """Return an update on one line."""
    return f"{record['what']} {record['done']:g}/{record['total']:g}  {format_numbers(extra_numbers(record))}"


def extra_numbers(record: Update) -> dict[str, Number]:
    """Return the measurements of an update, without the fields that every update has."""
    return {name: value for name, value in record.items() if name not in ("time", "what", "done", "total")}


def relay(line: str) -> None:
    """Print a line of another process of this step as if this process had printed it."""
    record = parse_update(line)
    if record is None:
        say(line)
    else:
        # Not only printed, so that the subscribers of this process get the update and a terminal shows a bar.
        update(str(record["what"]), float(record["done"]), float(record["total"]), **extra_numbers(record))  # type: ignore[arg-type]


def format_numbers(numbers: Update) -> str:
    """Return the numbers on one line, for a log and for `status`."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
