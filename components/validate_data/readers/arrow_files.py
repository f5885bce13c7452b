"""Read rows from Parquet and Arrow files, in batches, since a file can be larger than the memory.

Values become those of JSON: a date its ISO form, a decimal number its digits, a label that the schema names its name.
Bytes that are UTF-8 become text. Other bytes, such as an image, are not read: `b""` stands for them.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from components.validate_data.readers import limits
from components.validate_data.readers.record import Record
from components.validate_data.readers.source_file import SourceFile
from components.validate_data.values import shorten
from qlora_retrain.core import progress
from qlora_retrain.core.bounds import Bounds
from qlora_retrain.core.errors import UsageError

_BATCH_BYTES = 1 << 25
_MAX_BATCH_ROWS = 1024
# Of a batch whose values are stored once for many rows, at the very worst.
_MAX_BATCH_BYTES = 1 << 26
# Of a batch, however it is stored: its pages are unpacked before the first row is seen.
_MAX_DECODING_BYTES = 1 << 29
# Of a Parquet file: what describes its columns and row groups, and is read first; its end says how long it is. Memory
# that runs out while they are read may end the process, since not every part of the library expects it.
_MAX_FOOTER_BYTES, _FOOTER_END_BYTES, _MAX_COLUMNS = 1 << 24, 8, 10_000
# `datasets` stores a list of turns as one list a key; these keys mark them.
_TURN_KEYS = (frozenset(("role", "content")), frozenset(("from", "value")))


def read_parquet(file: SourceFile) -> Iterator[Record]:
    """Yield the rows of a Parquet file.

    Raises:
        UsageError: If it is damaged or packed.
    """
    if file.compression:
        raise UsageError(f"{file.name}: a Parquet file inside {file.compression}; unpack it, since it is packed itself")
    yield from _records(file, "Parquet", _parquet_batches(file))


def read_arrow(file: SourceFile) -> Iterator[Record]:
    """Yield the rows of an Arrow file or stream, e.g. of `Dataset.save_to_disk`.

    Raises:
        UsageError: If it is damaged or packed.
    """
    if file.compression:
        raise UsageError(f"{file.name}: an Arrow file inside {file.compression}; unpack it")
    yield from _records(file, "Arrow", _arrow_batches(file))


def _parquet_batches(file: SourceFile) -> Iterator[pyarrow.RecordBatch]:
    with file.path.open("rb") as stream:
        stream.seek(-_FOOTER_END_BYTES, os.SEEK_END)
        footer_bytes = int.from_bytes(stream.read(4), "little")
    # A larger number than the file has bytes is no footer's, and the library says that the file is damaged.
    if _MAX_FOOTER_BYTES < footer_bytes < file.path.stat().st_size:
        raise UsageError(
            f"{file.name}: the footer has {footer_bytes:,} bytes, and {_MAX_FOOTER_BYTES:,} are the most; write the "
            "file with larger row groups and fewer columns, or leave it out"
        )
    with pyarrow.parquet.ParquetFile(file.path) as parquet:
        if parquet.metadata.num_columns > _MAX_COLUMNS:
            raise UsageError(
                f"{file.name}: the file has {parquet.metadata.num_columns:,} columns, and {_MAX_COLUMNS:,} are the "
                "most; keep those that hold the rows' texts, or leave it out"
            )
        if parquet.metadata.num_rows * limits.MIN_ROW_CHARACTERS > file.max_characters:
            raise file.too_large()
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            worst_bytes = sum(_worst_row_bytes(file, group.column(j), group.num_rows) for j in range(group.num_columns))
            size = _batch_rows(group.total_byte_size, group.num_rows, worst_bytes)
            # One thread, so that memory that runs out is an error here and not the end of the process.
            yield from parquet.iter_batches(batch_size=size, row_groups=[i], use_threads=False)


def _worst_row_bytes(file: SourceFile, column: Any, num_rows: int) -> int:
    """Return how many bytes a row may have in this column where values are stored once and repeated for nothing."""
    value_bytes = 0
    if "DELTA_BYTE_ARRAY" in column.encodings:  # a value repeats the beginning of the one before it
        value_bytes = int(column.total_uncompressed_size)
    elif column.dictionary_page_offset:
        with file.path.open("rb") as stream:
            stream.seek(column.dictionary_page_offset)
            value_bytes = _page_bytes(stream.read(16)) or int(column.total_uncompressed_size)
    # A row of a list has several values.
    return value_bytes * -(-int(column.num_values) // max(1, num_rows))


def _page_bytes(header: bytes) -> int | None:
    """Return the unpacked size of a Parquet page, the second field of its header; None for another header.

    Fields are written in Thrift's compact protocol: 0x15 is the next field, an integer in groups of seven bits.
    """
    match = re.match(rb"\x15.\x15([\x80-\xff]*[\x00-\x7f])", header, re.DOTALL)
    if match is None:
        return None
    zigzag: int = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(match[1]))
    return zigzag >> 1


def _arrow_batches(file: SourceFile) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.memory_map(str(file.path)) as source:
        if file.head.startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            # Damaged offsets would otherwise be followed wherever they point.
            batch.validate(full=True)
            yield batch


def _batch_rows(size_bytes: int, num_rows: int, worst_row_bytes: int = 0) -> int:
    row_bytes = max(1, size_bytes // max(1, num_rows))
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes, _MAX_BATCH_BYTES // max(1, worst_row_bytes)))


class _Part(NamedTuple):
    """Some rows that were decoded together; `size_bytes` is 0 where they share values, which nobody has counted."""

    schema: pyarrow.Schema
    rows: list[dict[str, Any]]
    size_bytes: int


def _parts(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[_Part]:
    for batch in batches:
        # Several rows may share a value, and each gets its own copy here.
        shares_values = any(map(_may_share, batch.schema.types))
        worst_row_bytes = batch.get_total_buffer_size() if shares_values else 0
        num_rows = _batch_rows(batch.nbytes, batch.num_rows, worst_row_bytes)
        for start in range(0, batch.num_rows, num_rows):
            part = batch.slice(start, num_rows)
            yield _Part(batch.schema, part.to_pylist(), 0 if shares_values else part.nbytes)


def _may_share(type_: pyarrow.DataType) -> bool:
    """Return whether values of this type, or inside of it, may be stored once for several rows."""
    types, is_ = [type_], pyarrow.types
    while types:
        current = types.pop()
        if is_.is_dictionary(current) or is_.is_run_end_encoded(current) or "view" in str(current).partition("<")[0]:
            return True
        types += [current.field(i).type for i in range(current.num_fields)]
    return False


def _within_memory(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[_Part]:
    # The first allocation reserves a GiB of addresses, which the limit would count as used.
    pyarrow.allocate_buffer(1)
    parts = _parts(batches)
    while True:
        # A damaged or a hostile file says what it likes about its sizes.
        with Bounds(_MAX_DECODING_BYTES):
            part = next(parts, None)
        if part is None:
            return
        yield part


def _records(file: SourceFile, format_name: str, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Record]:
    number, num_bytes = 0, 0
    label_names: Mapping[str, list[str]] | None = None
    try:
        for part in _within_memory(batches):
            if label_names is None:
                label_names = _label_names(part.schema)
                for column, names in label_names.items():
                    progress.say(
                        f'{file.name}: the numbers in "{shorten(column)}" stand for the {len(names)} names of its '
                        "schema"
                    )
            num_bytes += part.size_bytes
            is_counted = 0 < part.size_bytes <= limits.MAX_ROW_CHARACTERS
            for values in part.rows:
                number += 1
                if not is_counted:
                    row_characters = limits.count_characters(values, limits.MAX_ROW_CHARACTERS)
                    num_bytes += 0 if part.size_bytes else row_characters
                    if row_characters > limits.MAX_ROW_CHARACTERS:
                        raise limits.row_too_long(f"{file.name}:{number}")
                if num_bytes > file.max_characters:
                    raise file.too_large()
                fields = {name: _value(value, label_names.get(name)) for name, value in values.items()}
                yield Record(file.name, number, fields, is_padded=True)
    except MemoryError as error:
        size_bytes = file.path.stat().st_size
        raise UsageError(
            f"{file.name}: row {number + 1} and those that are decoded with it need more than "
            f"{_MAX_DECODING_BYTES >> 20:,} MiB, and the file has {size_bytes:,} bytes; write it with smaller row "
            "groups and pages, e.g. `pyarrow.parquet.write_table(..., row_group_size=1000)`, or leave it out"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"{file.name}: cannot be read as {format_name} after row {number} ({type(error).__name__}); fetch the file "
            "again"
        ) from error


def _label_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Return the names of the labels that `datasets` stores as numbers, by their column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {column: feature for column, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {column: [str(name) for name in feature["names"]] for column, feature in labels.items()}
    # The schema says nothing about labels, or it is of another program.
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _value(value: Any, names: list[str] | None = None) -> Any:
    """Return an Arrow value as one of JSON."""
    if names is not None and isinstance(value, int):
        # -1 stands for a row without a label.
        return names[value] if 0 <= value < len(names) else None
    match value:
        case dict():
            return _as_turns({key: _value(inner) for key, inner in value.items()})
        # A map of Arrow.
        case [(_, _), *_] if all(isinstance(item, tuple) for item in value):
            return {str(key): _value(inner) for key, inner in value}
        case list() | tuple():
            return [_value(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return b""
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | datetime.timedelta():
            return str(value)
    return value


def _as_turns(fields: dict[str, Any]) -> Any:
    """Return the list of turns that `datasets` stores as an object of lists; any other object as it is."""
    if not any(keys <= fields.keys() for keys in _TURN_KEYS):
        return fields
    columns = list(fields.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return fields
    return [dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True)]
