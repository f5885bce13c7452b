"""Files to raw rows: JSON lines, CSV and Parquet, UTF-8 only, nothing guessed and nothing unpickled.

What makes a whole file unusable (encoding, syntax, a missing column, no rows) is a `UsageError` that names the file and
the line. What is wrong with one row (a ragged CSV record, a missing field) travels with that row as its fault.
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
LONGEST_CSV_FIELD = 16 * 1024 * 1024  # the csv module's own limit, 128 Ki characters, is less than a long chat
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8}){0,3}")  # e.g. de, pt-BR, english
Record = Mapping[str, object] | str  # a row's fields, or the reason why it has none


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as found.

    Attributes:
        file: Relative to the source's folder.
        number: 1-based; the line on which the row begins, in Parquet the row.
        messages: What should be a chat; anything.
        fault: The reason code, where there is not even something to look at.
        language: What `data.language_field` says, if it is a language tag.
    """

    file: str
    number: int
    messages: object
    fault: str | None = None
    language: str | None = None


def read(folder: Path, config: DataConfig, source: str) -> Iterator[RawRow]:
    """Every row of every file, files in the order of their names.

    Raises:
        UsageError: For a file that cannot be read as its format, has no rows, or lacks a needed field in every row.
    """
    files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    if not files:
        raise UsageError(f"{source}: no files; the source is an empty folder, or its `files` patterns match nothing")
    formats = {name: _format(name, config, source) for name, _ in files}
    for name, path in files:
        yield from _rows(name, _records(name, path, formats[name], config), config, formats[name])


def wanted_fields(config: DataConfig) -> tuple[str, ...]:
    """The fields that a row must have: the chat's, or the prompt's and the answer's."""
    if config.prompt_field is not None and config.response_field is not None:
        return (config.prompt_field, config.response_field)
    return (config.messages_field,)


def read_fields(config: DataConfig) -> tuple[str, ...]:
    """The fields that are looked at: those that a row must have, and the language's."""
    return wanted_fields(config) + ((config.language_field,) if config.language_field else ())


def _format(name: str, config: DataConfig, source: str) -> str:
    if config.format != "auto":
        return config.format
    ending = Path(name).suffix.lower()
    if ending not in FORMATS:
        raise UsageError(
            f"{source}: {name}: wanted a file that ends in {', '.join(FORMATS)}; rename it, set data.format, "
            f"or leave it out with sources.{source}.files"
        )
    return FORMATS[ending]


def _records(name: str, path: Path, format_: str, config: DataConfig) -> Iterator[tuple[int, Record]]:
    if format_ == "parquet":
        return _parquet(name, path, read_fields(config))
    return _csv(name, path, read_fields(config)) if format_ == "csv" else _jsonl(name, path)


def _rows(name: str, records: Iterable[tuple[int, Record]], config: DataConfig, format_: str) -> Iterator[RawRow]:
    wanted = wanted_fields(config)
    read_rows = 0
    missing, found = set(wanted), dict[str, None]()
    for number, record in records:
        read_rows += 1
        if isinstance(record, str):
            yield RawRow(name, number, None, record)
            continue
        missing = {field for field in missing if record.get(field) is None}
        if len(found) < 50:
            found.update(dict.fromkeys(record))
        values = [record.get(field) for field in wanted]
        if any(value is None for value in values):
            yield RawRow(name, number, values, "missing_field")
        elif len(wanted) == 2:
            prompt, answer = values
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield RawRow(name, number, turns, language=_language(record, config))
        elif format_ == "jsonl" or not isinstance(values[0], str):
            yield RawRow(name, number, values[0], language=_language(record, config))
        else:  # a column of text that holds JSON
            try:
                yield RawRow(name, number, json.loads(values[0]), language=_language(record, config))
            except (ValueError, RecursionError):
                yield RawRow(name, number, values[0], "bad_json")
    if not read_rows:
        raise UsageError(f"{name}: no rows; leave the file out, or find out why it is empty")
    if missing and found:
        raise _missing(name, next(field for field in wanted if field in missing), list(found), "no row has a value for")


def _language(record: Mapping[str, object], config: DataConfig) -> str | None:
    """The row's language tag; whatever else the field holds could be anything, and is not kept."""
    said = record.get(config.language_field) if config.language_field else None
    return said.lower() if isinstance(said, str) and _LANGUAGE.fullmatch(said) else None


def _lines(name: str, path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = offset + error.start
                raise UsageError(
                    f"{name}:{number}: byte {place} of the file (0x{line[error.start]:02x}) is not UTF-8; find the "
                    "file's encoding and convert it, e.g. `iconv -f ISO-8859-1 -t UTF-8`"
                ) from None
            offset += len(line)
            yield text.removeprefix(codecs.BOM_UTF8.decode()) if number == 1 else text


def _jsonl(name: str, path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(name, path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of more than 4,300 digits
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "not readable"
            raise UsageError(
                f"{name}:{number}: not a line of JSON ({what}); each line must be one whole object. "
                "If it is the last line, the file was cut off: fetch it again"
            ) from None
        yield number, value if isinstance(value, dict) else "not_an_object"


def _csv(name: str, path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader(_lines(name, path), strict=True)
    header: list[str] | None = None
    while True:
        begins = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UsageError(f"{name}:{begins}: not CSV ({error}); is a quote open, or the file cut off?") from None
        if fields is None:
            return
        if not fields:  # an empty line
            continue
        if header is None:
            header = fields
            for column in wanted:
                if header.count(column) != 1:
                    many = "found more than once the" if column in header else "wanted a"
                    raise _missing(name, column, header, many)
            continue
        yield begins, dict(zip(header, fields, strict=True)) if len(fields) == len(header) else "ragged_row"


def _parquet(name: str, path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Record]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in wanted:
                if column not in file.schema_arrow.names:
                    raise _missing(name, column, file.schema_arrow.names, "wanted a")
            for batch in file.iter_batches(batch_size=4096, columns=list(wanted)):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"{name}: not Parquet that can be read (after row {number}: {type(error).__name__}); fetch it again"
        ) from error


def _missing(name: str, column: str, found: Sequence[str], what: str) -> UsageError:
    near = difflib.get_close_matches(column, found, n=1)
    shown = ", ".join(field[:40] for field in found[:20])  # cut: a headless CSV shows its first row here
    hint = f"; did you mean {near[0][:40]}?" if near and near[0] != column else ""
    if len(found) == 1 and any(mark in found[0] for mark in ";\t|"):
        hint = "; fields must be separated by commas"
    return UsageError(
        f'{name}: {what} field "{column}"; found: {shown}{hint} '
        "(set data.prompt_field and data.response_field, or data.messages_field)"
    )
