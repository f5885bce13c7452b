"""Where a JSON document of one object has its rows: the object is a row itself, or it holds them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.validate_data.values import shorten
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

Kind = Literal["row", "list", "numbered_rows", "columns", "table", "indexed_columns", "rows_by_id"]
# Names of a list of turns, and of the texts of a row; an object that has one is a row.
_CHAT_FIELDS = frozenset("messages conversations conversation dialog dialogue turns chat history".split())
_TEXT_FIELDS = frozenset(
    "prompt instruction question query input text completion response output answer chosen rejected system".split()
)
# The keys of a turn; a list of such objects is a chat.
_TURN_KEYS = (frozenset(("role", "content")), frozenset(("from", "value")))
_MIN_ROWS_BY_ID = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the rows are, and under which keys, one inside the other."""

    kind: Kind
    keys: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Format the keys for a message."""
        return '"' + ".".join(shorten(key) for key in self.keys) + '"'


def recognise_shape(name: str, sketch: Mapping[str, Any], config: DataConfig, keys: tuple[str, ...] = ()) -> Shape:
    """Return where a document's rows are.

    Args:
        name: The file's name.
        sketch: The document; of a long list, the first items are enough.
        config: The fields that it names are those of a row.
        keys: Where in the file's object the document lies.

    Raises:
        UsageError: If several lists could be the rows.
    """
    if _is_row(sketch, config):
        return Shape("row")

    lists = {key: value for key, value in sketch.items() if isinstance(value, list) and value}
    objects = [key for key, value in lists.items() if isinstance(value[0], dict)]
    # As the dataset viewer of the Hugging Face hub hands rows out.
    if "rows" in objects and "row" in lists["rows"][0]:
        return Shape("numbered_rows", (*keys, "rows"))
    if len(objects) == 1:
        return Shape("list", (*keys, objects[0]))
    if objects:
        path = ".".join((*keys, objects[0]))
        example = f"jq -c '.{path}[]' {shlex.quote(name)} > {objects[0]}.jsonl"
        raise UsageError(
            f"{name}: the file holds {len(objects)} lists of objects ({', '.join(map(shorten, objects))}), and nothing "
            f"says which are the rows; write one into a file of its own, e.g. `{example}`. An evaluation list "
            "belongs in sources.eval_data"
        )

    # One level further down, e.g. {"rasa_nlu_data": {"common_examples": [...]}}.
    nested = [key for key, value in sketch.items() if isinstance(value, dict) and _has_objects(value)]
    if len(nested) == 1 and not keys:
        return recognise_shape(name, sketch[nested[0]], config, (nested[0],))

    # As pandas writes frames: `orient="split"`, "columns" and "index".
    if {"columns", "data"} <= lists.keys() and isinstance(lists["data"][0], list):
        return Shape("table")
    if len(lists) > 1 and len(lists) == len(sketch):
        return Shape("columns")
    inner = [value for value in sketch.values() if isinstance(value, dict) and value]
    if sketch and len(inner) == len(sketch):
        if all(key.isdigit() for value in inner for key in value):
            return Shape("indexed_columns")
        if len(inner) >= _MIN_ROWS_BY_ID and len({frozenset(value) for value in inner}) == 1:
            return Shape("rows_by_id")
    return Shape("row")


def rows_of(name: str, document: Mapping[str, Any], shape: Shape) -> Iterator[Any]:
    """Yield the rows of a document that is not a list of them.

    Raises:
        UsageError: If columns differ in length.
    """
    match shape.kind:
        case "table":
            columns = [str(column) for column in document["columns"]]
            for values in document["data"]:
                yield dict(zip(columns, values, strict=True)) if len(values) == len(columns) else values
        case "columns":
            lengths = {key: len(values) for key, values in document.items()}
            if len(set(lengths.values())) > 1 and all(isinstance(values[0], list) for values in document.values()):
                largest = max(lengths, key=lambda key: lengths[key])
                command = f"jq -c '.{largest}[] | {{text: .[0], label: .[1]}}' {shlex.quote(name)} > {largest}.jsonl"
                raise UsageError(
                    f"{name}: the file holds {len(lengths)} lists of rows without names "
                    f"({', '.join(map(shorten, document))}); write one into a file of its own with a name for "
                    f"each item, e.g. `{command}`"
                )
            if len(set(lengths.values())) > 1:
                stated = ", ".join(f"{shorten(key)} {length:,}" for key, length in lengths.items())
                raise UsageError(f"{name}: the file holds columns of different lengths ({stated}); mend the file")
            for values in zip(*document.values(), strict=True):
                yield dict(zip(document, values, strict=True))
        case "indexed_columns":
            indices = dict.fromkeys(index for values in document.values() for index in values)
            for index in indices:
                yield {key: values.get(index) for key, values in document.items()}
        case "rows_by_id":
            yield from document.values()
        case _:
            yield document


def is_chat(value: object) -> bool:
    """Return whether the value is a list of turns."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and any(keys <= turn.keys() for keys in _TURN_KEYS) for turn in value)


def configured_fields(config: DataConfig) -> frozenset[str]:
    """Return the first name of every field that the config reads, e.g. `translation` of `translation.en`."""
    fields = (
        config.messages_field, config.prompt_field, config.response_field, config.system_field, config.tools_field,
        config.text_field, config.language_field,
    )  # fmt: skip
    return frozenset(field.partition(".")[0] for field in fields if field)


def _has_objects(document: Mapping[str, Any]) -> bool:
    return any(isinstance(value, list) and value and isinstance(value[0], dict) for value in document.values())


def _is_column(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and not isinstance(value[0], dict)


def _is_row(document: Mapping[str, Any], config: DataConfig) -> bool:
    # Lists of values may be the columns of many rows.
    if any(not _is_column(document[field]) for field in configured_fields(config) & document.keys()):
        return True
    has_text = any(isinstance(document.get(field), str) for field in _TEXT_FIELDS)
    return has_text or any(is_chat(value) for key, value in document.items() if key in _CHAT_FIELDS or key == "data")
