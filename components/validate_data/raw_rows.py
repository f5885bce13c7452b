"""Read raw rows from JSON lines, CSV and Parquet files. Text must be UTF-8, and nothing is guessed or unpickled.

A fault that makes a whole file unusable (encoding, syntax, a missing column, no rows) is a `UsageError` that names the
file and the line. A fault of one row (a ragged CSV record, a missing field) travels with that row.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core.errors import UsageError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json-lines": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
# The csv module's own limit, 128 Ki characters, is less than a long chat.
MAX_CSV_FIELD_CHARACTERS = 16 * 1024 * 1024
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8}){0,3}")  # e.g. de, pt-BR, english
_MAX_FIELD_NAMES = 50  # in the message about a missing field; each row of JSON may have other names
Record = Mapping[str, object] | str  # a row's fields, or the reason code of a row that has none


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it is in its file.

    Attributes:
        file: The path below the source's folder.
        number: The line on which the row begins, from 1; in Parquet the number of the row.
        messages: The value that should be a chat; it can be anything.
        fault: The reason code of a row that has no such value.
        language: The value of `data.language_field`, if it is a language tag.
    """

    file: str
    number: int
    messages: object
    fault: str | None = None
    language: str | None = None


def read_rows(folder: Path, config: DataConfig, source: str) -> Iterator[RawRow]:
    """Yield every row of every file, in the order of the file names.

    Raises:
        UsageError: For a file that cannot be read as its format, has no rows, or lacks a needed field in every row.
    """
    files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    if not files:
        raise UsageError(
            f"{source}: there are no files; the source is an empty folder, or sources.{source}.files matches no file"
        )
    # All formats are checked first, so that a wrong name is reported before large files are read.
    formats = {name: _format(name, config, source) for name, _ in files}
    for name, path in files:
        yield from _rows(name, _records(name, path, formats[name], config), config, formats[name])


def required_fields(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the required fields: the one of the chat, or those of the prompt and the answer."""
    if config.prompt_field is not None and config.response_field is not None:
        return (config.prompt_field, config.response_field)
    return (config.messages_field,)


def used_fields(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the fields that are read: the required ones, and that of the language."""
    return required_fields(config) + ((config.language_field,) if config.language_field else ())


def _format(name: str, config: DataConfig, source: str) -> str:
    if config.format != "auto":
        return config.format

    suffix = Path(name).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(
            f"{source}: {name}: expected a file that ends in {', '.join(FORMATS)}; rename it, set data.format, "
            f"or leave it out with sources.{source}.files"
        )
    return FORMATS[suffix]


def _records(name: str, path: Path, format_: str, config: DataConfig) -> Iterator[tuple[int, Record]]:
    if format_ == "parquet":
        return _parquet(name, path, used_fields(config))
    return _csv(name, path, used_fields(config)) if format_ == "csv" else _jsonl(name, path)


def _rows(name: str, records: Iterable[tuple[int, Record]], config: DataConfig, format_: str) -> Iterator[RawRow]:
    """Yield a file's records as raw rows."""
    required = required_fields(config)
    num_rows = 0
    # The required fields that no row so far has, and the field names of all records, in the order of occurrence.
    missing, field_names = set(required), dict[str, None]()
    for number, record in records:
        num_rows += 1
        if isinstance(record, str):
            yield RawRow(name, number, None, record)
            continue

        missing = {field for field in missing if record.get(field) is None}
        if len(field_names) < _MAX_FIELD_NAMES:
            field_names.update(dict.fromkeys(record))
        values = [record.get(field) for field in required]
        # A null is a missing value too: Parquet gives every row every column.
        if any(value is None for value in values):
            yield RawRow(name, number, values, "missing_field")
        elif len(required) == 2:
            prompt, answer = values
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield RawRow(name, number, turns, language=_language(record, config))
        elif format_ == "jsonl" or not isinstance(values[0], str):
            yield RawRow(name, number, values[0], language=_language(record, config))
        else:
            # A column of a CSV or Parquet file that holds the chat as JSON text.
            try:
                yield RawRow(name, number, json.loads(values[0]), language=_language(record, config))
            except (ValueError, RecursionError):
                yield RawRow(name, number, values[0], "bad_json")

    if not num_rows:
        raise UsageError(f"{name}: the file has no rows; leave it out, or find out why it is empty")
    # JSON lines have no header, so a misspelt data.messages_field is noticed only when every row lacks the field.
    if missing and field_names:
        first_missing = next(field for field in required if field in missing)
        raise _field_error(name, first_missing, list(field_names), "no row has a value for the field")


def _language(record: Mapping[str, object], config: DataConfig) -> str | None:
    """Return the row's language tag, in lower case; any other value could be personal data and is left out."""
    value = record.get(config.language_field) if config.language_field else None
    return value.lower() if isinstance(value, str) and _LANGUAGE.fullmatch(value) else None


def _lines(name: str, path: Path) -> Iterator[str]:
    """Yield a file's lines as text, without a byte order mark."""
    offset_bytes = 0

    # Read in binary, so that an error can name the line and the byte.
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                position = offset_bytes + error.start
                raise UsageError(
                    f"{name}:{number}: byte {position} of the file (0x{line[error.start]:02x}) is not UTF-8; find the "
                    "file's encoding and convert it, e.g. `iconv -f ISO-8859-1 -t UTF-8`"
                ) from None
            offset_bytes += len(line)
            yield text.removeprefix(codecs.BOM_UTF8.decode()) if number == 1 else text


def _jsonl(name: str, path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(name, path), 1):
        if not line.strip():
            continue
        # ValueError: also for a number of more than 4,300 digits, which Python does not parse.
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            fault = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "not readable"
            raise UsageError(
                f"{name}:{number}: the line is not JSON ({fault}); each line must be one whole object. "
                "If it is the last line, the file was cut off: fetch it again"
            ) from None
        yield number, value if isinstance(value, dict) else "not_an_object"


def _csv(name: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    reader = csv.reader(_lines(name, path), strict=True)
    header: list[str] | None = None
    while True:
        # The record's first line. A quoted field may hold line breaks, so the reader's own count is of the last line.
        first_line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UsageError(
                f"{name}:{first_line}: not valid CSV ({error}); close the quote, or fetch the file again"
            ) from None
        if fields is None:
            return
        if not fields:  # an empty line
            continue

        if header is None:
            header = fields
            for column in columns:
                if header.count(column) != 1:
                    fault = "more than one column has the name" if column in header else "there is no field"
                    raise _field_error(name, column, header, fault)
            continue
        yield first_line, dict(zip(header, fields, strict=True)) if len(fields) == len(header) else "ragged_row"


def _parquet(name: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    number = 0

    try:
        # Only these columns are read, in batches, since a file can be larger than the memory.
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise _field_error(name, column, file.schema_arrow.names, "there is no field")
            for batch in file.iter_batches(batch_size=4096, columns=list(columns)):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"{name}: cannot be read as Parquet after row {number} ({type(error).__name__}); fetch the file again"
        ) from error


def _field_error(name: str, column: str, field_names: Sequence[str], fault: str) -> UsageError:
    """Return the error for a file without a required field; it lists the field names that the file has."""
    near = difflib.get_close_matches(column, field_names, n=1)
    # Shortened: in a CSV file without a header these names are the first row, and a message must not show a row.
    listing = ", ".join(field[:40] for field in field_names[:20])

    hint = f"; did you mean {near[0][:40]}?" if near and near[0] != column else ""
    if len(field_names) == 1 and any(mark in field_names[0] for mark in ";\t|"):
        hint = "; separate the fields by commas"

    return UsageError(
        f'{name}: {fault} "{column}"; the fields are: {listing}{hint} '
        "(set data.prompt_field and data.response_field, or data.messages_field)"
    )
