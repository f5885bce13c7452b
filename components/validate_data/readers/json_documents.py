"""Read rows from a JSON document that goes over several lines, or has a single one: a list, or objects that hold rows.

Nothing says where the next row begins behind a fault of the syntax, so there it is an error of the file. A document is
read item by item; only one whose rows lie across it, such as columns, is read as a whole.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from components.validate_data.readers import json_shapes, limits
from components.validate_data.readers.json_rows import as_record, numbered_row, to_record
from components.validate_data.readers.json_text import Decoded, JsonText, ValueTooLong
from components.validate_data.readers.record import Record
from components.validate_data.readers.source_file import SourceFile
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError

_SKETCH_ITEMS = 2
_LIST_FROM_PYTHON = (
    "import ast, json, sys; [print(json.dumps(row)) for row in ast.literal_eval(sys.stdin.read())]"  # of a whole file
)
_FROM_PYTHON = "import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) for line in sys.stdin]"


def read_document(file: SourceFile, config: DataConfig) -> Iterator[Record]:
    """Yield the rows of a document, numbered by their lines, or one by one where several rows share a line.

    Raises:
        UsageError: If it is not JSON, or does not say where its rows are.
    """
    records = _read_rows(file, config)
    first_two = list(itertools.islice(records, 2))
    share_a_line = len(first_two) == 2 and first_two[0].number == first_two[1].number
    for ordinal, record in enumerate(itertools.chain(first_two, records), 1):
        yield replace(record, number=ordinal) if share_a_line else record


def _read_rows(file: SourceFile, config: DataConfig) -> Iterator[Record]:
    with file.reading_errors(), file.open_text() as stream:
        text = JsonText(stream, file.line_end)
        try:
            is_object = text.peek() == "{"
            sketch = _Sketch(text).read() if is_object else {}
            # Several objects one after another are rows; a single one may hold them.
            is_single = is_object and not text.peek()
        except (json.JSONDecodeError, ValueTooLong, RecursionError) as error:
            raise _document_error(file, text, error) from None
    shape = json_shapes.Shape("row")
    if is_single and config.format != "jsonl":
        shape = json_shapes.recognise_shape(file.name, sketch, config)

    with file.reading_errors(), file.open_text() as stream:
        text = JsonText(stream, file.line_end)
        try:
            yield from _read_shape(file, text, shape)
        except (json.JSONDecodeError, ValueTooLong, RecursionError) as error:
            raise _document_error(file, text, error) from None


def _read_shape(file: SourceFile, text: JsonText, shape: json_shapes.Shape) -> Iterator[Record]:
    name = file.name
    if shape.kind in ("list", "numbered_rows"):
        progress.say(f"{name}: the rows are the list {shape.label}")
        for line, decoded in _items_under(text, shape.keys):
            is_wrapped = shape.kind == "numbered_rows"
            yield numbered_row(name, line, decoded) if is_wrapped else to_record(name, line, decoded)
    elif shape.kind == "row":
        # Lists and objects may follow each other; between them a comma changes nothing.
        while text.peek():
            if text.peek() == "[":
                for line, decoded in _items(text):
                    yield to_record(name, line, decoded)
            else:
                line = text.line
                yield to_record(name, line, text.value())
            text.skip(",")
    else:
        # Rows that lie across the document: it must be read as a whole.
        decoded = text.value(limits.MAX_DOCUMENT_CHARACTERS)
        if decoded.fault:
            raise UsageError(f"{name}: the document has a fault ({decoded.fault} {decoded.detail}); mend the file")
        for ordinal, value in enumerate(json_shapes.rows_of(name, decoded.value, shape), 1):
            yield as_record(name, ordinal, value)


def _items(text: JsonText) -> Iterator[tuple[int, Decoded]]:
    """Consume a list, and yield each item with the line on which it begins."""
    text.expect("[")
    while not text.skip("]"):
        text.peek()
        line = text.line
        yield line, text.value()
        # A comma after the last item is accepted.
        if text.peek() != "]":
            text.expect(",]")


def _members(text: JsonText) -> Iterator[str]:
    """Consume an object, and yield each key; the caller consumes the value."""
    text.expect("{")
    while not text.skip("}"):
        if text.peek() != '"':
            text.expect('"')
        key: str = text.value().value
        text.expect(":")
        yield key
        if text.peek() != "}":
            text.expect(",}")


def _items_under(text: JsonText, keys: tuple[str, ...]) -> Iterator[tuple[int, Decoded]]:
    """Consume an object, and yield the items of the list that lies under these keys, one inside the other."""
    for key in _members(text):
        if key != keys[0]:
            text.value()
        elif len(keys) > 1:
            yield from _items_under(text, keys[1:])
        else:
            yield from _items(text)


class _Sketch:
    """An object with the first items of its lists, and of those one level further down."""

    def __init__(self, text: JsonText) -> None:
        self._text = text
        self._num_characters = 0

    def read(self, levels: int = 2) -> Mapping[str, Any]:
        """Consume the object."""
        sketch: dict[str, Any] = {}
        for key in _members(self._text):
            self._keep(len(key) + limits.MIN_ROW_CHARACTERS)
            if self._text.peek() == "[":
                sketch[key] = []
                for _, decoded in _items(self._text):
                    if len(sketch[key]) < _SKETCH_ITEMS:
                        sketch[key].append(decoded.value)
            elif self._text.peek() == "{" and levels > 1:
                sketch[key] = self.read(levels - 1)
            else:
                start = self._text.offset
                sketch[key] = self._text.value().value
                self._keep(self._text.offset - start)
        return sketch

    def _keep(self, num_characters: int) -> None:
        """Count what stays in memory."""
        self._num_characters += num_characters
        if self._num_characters > limits.MAX_DOCUMENT_CHARACTERS:
            raise ValueTooLong


def _document_error(file: SourceFile, text: JsonText, error: ValueError | RecursionError) -> UsageError:
    if isinstance(error, ValueTooLong):
        return UsageError(
            f"{file.name}:{text.line}: the value that begins there has more than "
            f"{limits.MAX_ROW_CHARACTERS:,} characters, or the document more than "
            f"{limits.MAX_DOCUMENT_CHARACTERS:,}; write one object of a row on each line (JSON lines), e.g. with jq -c"
        )
    if not isinstance(error, json.JSONDecodeError):
        return UsageError(f"{file.name}:{text.line}: the value is nested too deep to be read; mend the file")

    line, column = text.location(error)
    location, fault = f"{file.name}:{line}", f"not JSON ({error.msg}, column {column})"
    remainder = error.doc[error.pos :]
    if remainder.startswith("'"):
        script = _FROM_PYTHON if error.doc.lstrip().startswith("{") else _LIST_FROM_PYTHON
        command = f'{file.command_input}python3 -c "{script}" > {shlex.quote(f"{file.name}.jsonl")}'
        return UsageError(f"{location}: {fault}, but Python's notation with single quotes; convert it: `{command}`")
    if remainder.startswith(("//", "/*", "#")):
        return UsageError(f"{location}: {fault}: JSON has no comments; take them out")
    if error.msg.startswith("Invalid control character") and remainder[:1] in "\r\n":
        return UsageError(f"{location}: {fault}: a line break inside of a text; JSON writes it as \\n")
    if text.is_whole and (not remainder.strip() or error.msg.startswith("Unterminated")):
        return UsageError(
            f"{location}: {fault}: the file ends inside the value that begins on line {text.line}, so it was cut off; "
            "fetch it again"
        )
    return UsageError(
        f"{location}: {fault}; expected one JSON object a line, or a list of objects. Mend the line, or set data.format"
    )
