"""The fields of a file as settings name them: paths through objects and the first items of lists, `answers.text.0`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from components.validate_data.field_names import LABELS, SYSTEMS, Columns, holds_text
from components.validate_data.row_shapes import nodes
from components.validate_data.values import describe_type, folded, is_empty, shorten, without_nan

# The last word of a field that says which row it is, or where it comes from.
_ABOUT_ROWS = frozenset(
    "id uuid ids url uri source date time timestamp ts at username lang language license licence split subset path "
    "repo name model domain subreddit tags status size hash meta metadata file filename start end offset count index "
    "idx topic turns system".split()
)
MAX_CATEGORIES = 20
_MAX_LISTED_FIELDS = 20
_MIN_PROSE_WORDS, _MIN_PROSE_CHARACTERS = 3, 30
# Fields that say why an answer is what it is, and would give it away.
_EXPLANATIONS = frozenset("reason reasoning reasons rationale explanation justification comment feedback".split())
_QUERY = re.compile(r"(?i)\s*(select|with|insert|update|delete|create|match|prefix|ask|db\.)\b")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+")
# What YAML reads as something else than a text.
_YAML_WORDS = frozenset("true false yes no on off null y n".split())


def describe_fields(columns: Columns) -> str:
    """Return the fields with their types, those of objects by path, for a message."""
    leaves = leaves_of(columns)
    heads = {_head(path, columns) for path in leaves}
    leaves |= {name: values for name, values in columns.items() if name not in heads}
    ordered = sorted(leaves, key=lambda path: list(columns).index(_head(path, columns)))
    listing = [f"{shorten(path)} ({type_of(leaves[path])})" for path in ordered[:_MAX_LISTED_FIELDS]]
    return ", ".join(listing) + (", …" if len(leaves) > _MAX_LISTED_FIELDS else "")


def leaves_of(columns: Columns) -> Columns:
    """Return the values by their paths, without those that hold others; of a list of objects the first counts."""
    leaves: Columns = {}
    for name, values in columns.items():
        lists: set[str] = set()
        for value in values:
            for path, item in nodes(name, value):
                is_inner = isinstance(item, Mapping) or (
                    isinstance(item, list) and item and isinstance(item[0], Mapping)
                )
                if isinstance(item, list) and not is_inner:
                    lists.add(path)
                if not is_inner and not is_empty(without_nan(item)) and path.rpartition(".")[0] not in lists:
                    leaves.setdefault(path, []).append(item)
    return leaves


def _head(path: str, columns: Columns) -> str:
    return next(name for name in columns if path == name or path.startswith(f"{name}."))


def type_of(values: Sequence[object]) -> str:
    """Return the type of a field's values in words."""
    if not values:
        return "empty"
    is_texts = isinstance(values[0], list) and bool(values[0]) and isinstance(values[0][0], str)
    return "a list of texts" if is_texts else describe_type(values[0])


def words_of(path: str) -> list[str]:
    """Return the words of a field's own name, the last part of a path that is no number."""
    segment = next((part for part in reversed(path.split(".")) if not part.isdecimal()), path)
    return [word.casefold() for word in _WORD.findall(segment)]


def is_about_row(path: str) -> bool:
    """Return whether a field says which row it is, or holds a system turn."""
    words = words_of(path)
    # A field `name` alone may hold the text, unlike `repo_name`.
    is_about = bool(words) and words[-1] in _ABOUT_ROWS and words != ["name"] and not set(words) & set(LABELS)
    is_about |= folded(path.partition(".")[0]) in ("meta", "metadata")
    return is_about or folded(path.rpartition(".")[2]) in SYSTEMS


def is_prose(values: Sequence[object]) -> bool:
    """Return whether the values are mostly texts of some words."""
    texts = [value for value in values if isinstance(value, str)]
    # Some scripts write no blanks, and say with a character what others say with a word.
    num_words = sum(len(text.split()) + sum(character > "\u0e00" for character in text) // 2 for text in texts)
    is_long = num_words >= _MIN_PROSE_WORDS * len(texts) or sum(map(len, texts)) >= _MIN_PROSE_CHARACTERS * len(texts)
    # A handful of texts that come again and again are categories.
    return holds_text(values) and (len(texts) < MAX_CATEGORIES or (is_long and len(set(texts)) * 5 > len(texts)))


def is_category(values: Sequence[object]) -> bool:
    """Return whether the values are a few that come again, each alone or in a list of one."""
    items = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
    scalars = {item for item in items if isinstance(item, str | int | float)}
    return all(isinstance(item, str | int | float) for item in items) and 1 < len(scalars) <= MAX_CATEGORIES


def quoted(name: str) -> str:
    """Return a name as YAML takes it for a text: with quotes where it would be a number or a mark."""
    is_plain = re.fullmatch(r"[^\W\d][\w .()/?-]*", name) and name.casefold() not in _YAML_WORDS
    return name if is_plain else json.dumps(name, ensure_ascii=False)


def are_queries(values: Sequence[object]) -> bool:
    """Return whether the values are queries in SQL or the like."""
    return all(isinstance(value, str) and _QUERY.match(value) for value in values)


def is_explanation(path: str) -> bool:
    """Return whether a field says why the label is what it is."""
    return bool(_EXPLANATIONS & set(words_of(path)))


def two_values(columns: Columns) -> list[str]:
    """Return the two fields that may be a prompt and an answer, where one at least is a list or an object."""
    fields = [
        name
        for name, values in columns.items()
        if values and not is_about_row(name) and isinstance(values[0], str | list | Mapping)
    ]
    is_value = [isinstance(columns[name][0], Mapping) or _is_list_of_values(columns[name][0]) for name in fields]
    are_whole = all(flag or is_prose(columns[name]) for name, flag in zip(fields, is_value, strict=True))
    return fields if len(fields) == 2 and any(is_value) and are_whole else []


def _is_list_of_values(value: object) -> bool:
    return isinstance(value, list) and not any(isinstance(item, list | Mapping) for item in value)
