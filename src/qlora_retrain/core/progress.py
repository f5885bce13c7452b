"""What long work says while it works: a bar on a terminal, JSON lines otherwise, and whoever listens."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from qlora_retrain.core.outcome import Number

Update = Mapping[str, Number]
_BAR_WIDTH = 28
_listeners: list[Callable[[Update], None]] = []


@contextlib.contextmanager
def listened(callback: Callable[[Update], None]) -> Iterator[None]:
    """Have every update in the block sent to `callback` too."""
    _listeners.append(callback)
    try:
        yield
    finally:
        _listeners.remove(callback)


def say(text: str) -> None:
    """One line for a person."""
    print(text, flush=True)


def update(what: str, done: float, total: float, **numbers: Number) -> None:
    """Tell how far the work is, e.g. `update("training", 30, 300, loss=0.41)`.

    Args:
        what: The work, in a word or two.
        done: Units finished; equal to `total` on the last call.
        total: Units in all.
        numbers: What else is known by now; units in the names.
    """
    record: dict[str, Number] = {"what": what, "done": done, "total": total, **numbers}
    for callback in _listeners:
        callback(record)
    if sys.stdout.isatty():
        filled = round(_BAR_WIDTH * min(1.0, done / total)) if total else _BAR_WIDTH
        bar = "█" * filled + "·" * (_BAR_WIDTH - filled)
        line = f"\r{what:<12} {bar} {done:g}/{total:g}  {_joined(numbers)}\x1b[K"
        print(line, end="\n" if done >= total else "", flush=True)
    else:
        print(json.dumps({"time": round(time.time(), 1), **record}), flush=True)


def parsed(line: str) -> Update | None:
    """An update as another process printed it, or None for any other line."""
    if not line.startswith('{"time"'):
        return None
    try:
        found: Update = json.loads(line)
    except ValueError:
        return None
    return found if {"what", "done", "total"} <= found.keys() else None


def numbers_of(found: Update) -> dict[str, Number]:
    """What an update tells beside how far the work is."""
    return {name: value for name, value in found.items() if name not in ("time", "what", "done", "total")}


def repeat(line: str) -> None:
    """Tell what another process of this step told, as if this one had."""
    found = parsed(line)
    if found is None:
        say(line)
    else:
        update(str(found["what"]), float(found["done"]), float(found["total"]), **numbers_of(found))  # type: ignore[arg-type]


def _joined(numbers: Update) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())


def one_line(numbers: Update) -> str:
    """The numbers on one line, for a log and for `status`."""
    return _joined(numbers)
