"""Look up a row's values by path, and write them as text; a value that cannot be used raises a `RowFault`.

A path names a field of a field, or an item of a list by its number: `translation.en`, `answers.text.0`.
"""

from __future__ import annotations

import ast
import datetime
import decimal
import difflib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

from components.validate_data.redaction import redact
from qlora_retrain.core import json_depth

MAX_NAME_CHARACTERS = 40  # of a name in a message: in a bad file even a name may be a row's text


class RowFault(Exception):
    """One row cannot be used.

    Attributes:
        reason: The code in `checks.REASONS`.
        detail: What was found, for a message; never a row's text beyond the name of a field, a role or a type.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def value_at(fields: object, path: str) -> object:
    """Return the value at the path, or None; a field whose own name has the dots comes first."""
    if isinstance(fields, Mapping) and path in fields:
        return without_nan(fields[path])
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        head, tail = ".".join(parts[:length]), ".".join(parts[length:])
        value = _child(fields, head)
        # A CSV file holds objects and lists as text.
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            value = parse_or_none(value)
        if value is not None and (result := value_at(value, tail)) is not None:
            return result
    return without_nan(_child(fields, path))


def _child(value: object, name: str) -> object:
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, list | tuple) and name.isdecimal() and int(name) < len(value):
        return value[int(name)]
    return None


def is_empty(value: object) -> bool:
    """Return whether a field has no value: null, white space alone, or an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def text_of(value: object) -> str:
    """Return the value as text: a text as it is, everything else as JSON writes it, dates in ISO form.

    An object keeps its keys in the row's order, so that the model learns what the person wrote.

    Raises:
        RowFault: For bytes that are no UTF-8, and for other values that have no text.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=text_of)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RowFault("bad_content_type", "bytes that are not UTF-8") from None
    raise RowFault("bad_content_type", describe_type(value))


def parse_json(text: str) -> object:
    """Return the value of JSON text, or of the same written as Python prints it (pandas does, into a CSV file).

    Raises:
        ValueError: If it is neither.
    """
    try:
        return json_depth.loads(text)
    except ValueError:
        if text.lstrip()[:1] not in ("{", "["):
            raise
    try:
        # Python warns of escapes such as \d, which are no fault here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return json_depth.refuse_deep(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("neither JSON nor Python") from error


def parse_or_none(text: str) -> object:
    """Return what `parse_json` does, or None."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def parsed(value: object) -> object:
    """Return the value, or the one that it writes as JSON text; other texts stay as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        result = parse_or_none(value)
        return value if result is None else result
    return value


def without_nan(value: object) -> object:
    """Return None for NaN, with which pandas writes a missing value; any other value as it is."""
    return None if isinstance(value, float) and math.isnan(value) else value


def without_nulls(value: object) -> object:
    """Return an object without its null fields, at every depth: Parquet adds to each the fields of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def leaf_paths(fields: Mapping[str, object], depth: int = 2) -> Iterator[tuple[str, object]]:
    """Yield each field's name and value, and the fields of an object by their paths instead of the object."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value and depth > 1:
            yield from ((f"{name}.{path}", item) for path, item in leaf_paths(value, depth - 1))
        else:
            yield str(name), without_nan(value)


def describe_type(value: object) -> str:
    """Return the type in words that are not Python's."""
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "text"),
        (bool, "true or false"),
        ((int, float, decimal.Decimal), "a number"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
        (bytes, "bytes"),
        (datetime.date, "a date"),
    )
    if value is None:
        return "null"
    return next((words for types, words in names if isinstance(value, types)), type(value).__name__)


def folded(name: str) -> str:
    """Return a field's name as it is compared: without letter case and punctuation."""
    return re.sub(r"[\W_]", "", name.casefold())


def shorten(name: object) -> str:
    """Return a name for a message, cut to 40 characters, without line breaks, secrets and personal data.

    A CSV file without a header has a row where the names should be.
    """
    text = redact(" ".join(str(name).split()))
    return text if len(text) <= MAX_NAME_CHARACTERS else text[: MAX_NAME_CHARACTERS - 1] + "…"


def near_match(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of the names, whatever their letter case, or None where none is as similar as that."""
    by_folded = {candidate.casefold(): candidate for candidate in names if candidate != name}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[matches[0]] if matches else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean NAME?`, or nothing where no name is similar."""
    match = near_match(name, names)
    return f"; did you mean {shorten(match)}?" if match else ""
