"""Look at what each row says: secrets, personal data, damaged and hidden text, orders to the model.

`config/data_checks.py` lists the checks and what each does by default. Texts never leave this module: a row only gets
the names of the checks that found something, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from components.validate_data import damaged_text, redaction
from components.validate_data.checks import Row
from components.validate_data.prompt_injection import find_prompt_injection
from components.validate_data.redaction import PLACEHOLDERS, Finder, replace
from qlora_retrain.config.data import DataConfig

# In this order: of several that keep a row out, the first one is its reason.
FINDERS: dict[str, Finder] = {
    **redaction.FINDERS,
    "replacement_characters": damaged_text.find_replacement_characters,
    "mojibake": damaged_text.find_mojibake,
    "control_characters": damaged_text.find_control_characters,
    "bidi_characters": damaged_text.find_bidi_characters,
    "invisible_tags": damaged_text.find_invisible_tags,
    "no_visible_text": damaged_text.find_no_visible_text,
    "prompt_injection": find_prompt_injection,
}


def check_texts(rows: Iterable[Row], config: DataConfig, *, is_reserved: bool) -> Iterator[Row]:
    """Yield the rows; note in each good one which checks found something, redact, and give a reason to bad ones.

    Args:
        rows: Rows of one source; those with a reason are left as they are.
        config: The checks and what each does.
        is_reserved: Whether a person chose these rows to measure with. They are not learnt, so `drop` only warns there.
    """
    enabled = [(name, finder) for name, finder in FINDERS.items() if config.checks[name] != "off"]
    for row in rows:
        if not row.reason:
            _check_row(row, enabled, config, is_reserved=is_reserved)
        yield row


def _check_row(row: Row, enabled: Sequence[tuple[str, Finder]], config: DataConfig, *, is_reserved: bool) -> None:
    places: dict[str, str] = {}

    def check(place: str, text: str) -> str:
        for name, find in enabled:
            if spans := find(text):
                places.setdefault(name, place)
                if config.checks[name] == "redact":
                    text = replace(text, spans, PLACEHOLDERS[name])
        return text

    messages, tools = row.chat_and_tools
    for i, turn in enumerate(messages):
        # The line's own system turn is in its config, where its author has read it.
        if turn["role"] == "system" and turn["content"] == config.system:
            continue
        place = f"turn {i + 1}, of the {turn['role']}"
        for field, value in turn.items():
            if field not in ("role", "weight"):
                turn[field] = _map_texts(value, partial(check, place))
    if tools:
        tools = _map_texts(tools, partial(check, "its tools"))
    row.replace_texts(messages, tools)

    row.hits = tuple(name for name in FINDERS if name in places)
    keeping_out = ("refuse",) if is_reserved else ("drop", "refuse")
    if reason := next((name for name in row.hits if config.checks[name] in keeping_out), None):
        row.reason, row.detail = reason, places[reason]


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every text changed; the names of its fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list) else value
