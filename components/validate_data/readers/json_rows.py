"""From a JSON value to a record."""

from __future__ import annotations

import json
from typing import Any

from components.validate_data.readers import json_shapes
from components.validate_data.readers.json_text import Decoded, StrictDecoder
from components.validate_data.readers.record import Record

_TYPE_NAMES = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def to_record(name: str, number: int, decoded: Decoded) -> Record:
    """Return the record of a value that stands where a row should be."""
    if decoded.fault:
        return Record(name, number, None, decoded.fault, decoded.detail)
    value = decoded.value
    # Encoded twice: a text that is the JSON of a row.
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        return _decoded_again(name, number, value.strip())
    return as_record(name, number, value)


def as_record(name: str, number: int, value: Any) -> Record:
    """Return the record of a value without a fault of its own."""
    # A chat without an object around it.
    if json_shapes.is_chat(value):
        value = {"messages": value}
    # Values without names have their places as names, and a text alone is one.
    if isinstance(value, list) and len(value) > 1 and any(isinstance(item, str) for item in value):
        value = {str(place): item for place, item in enumerate(value)}
    if isinstance(value, str) and value.strip():
        value = {"text": value}
    if isinstance(value, dict):
        return Record(name, number, value)
    return Record(name, number, None, "not_an_object", f"it is {_TYPE_NAMES.get(type(value), 'null')}")


def numbered_row(name: str, number: int, decoded: Decoded) -> Record:
    """Return the record of a row as the hub's dataset viewer wraps it; it says which values it shortened."""
    record = to_record(name, number, decoded)
    if record.fields is None:
        return record
    if record.fields.get("truncated_cells"):
        return Record(name, number, None, "bad_json_line", "the dataset viewer shortened its values; download the file")
    return as_record(name, number, record.fields.get("row"))


def _decoded_again(name: str, number: int, text: str) -> Record:
    try:
        decoded = StrictDecoder().decode(text)
    except (json.JSONDecodeError, RecursionError):
        decoded = None
    if decoded is None or decoded.end != len(text):
        return Record(name, number, None, "not_an_object", "it is a text")
    return to_record(name, number, decoded)
