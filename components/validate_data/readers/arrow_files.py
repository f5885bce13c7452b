"""Read rows from Parquet and Arrow files, in batches, since a file can be larger than the memory.

Values become those of JSON: a date its ISO form, a decimal number its digits, a label that the schema names its name.
Bytes that are UTF-8 become text. Other bytes, such as an image, are not read: `b""` stands for them.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from components.validate_data.readers.record import Record
from components.validate_data.readers.source_file import SourceFile
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError

_BATCH_BYTES = 1 << 25
_MAX_BATCH_ROWS = 1024
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
    with pyarrow.parquet.ParquetFile(file.path) as parquet:
        row_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
        yield from parquet.iter_batches(batch_size=_batch_rows(row_bytes, parquet.metadata.num_rows))


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
            size = _batch_rows(batch.nbytes, batch.num_rows)
            yield from (batch.slice(start, size) for start in range(0, batch.num_rows, size))


def _batch_rows(size_bytes: int, num_rows: int) -> int:
    row_bytes = max(1, size_bytes // max(1, num_rows))
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))


def _records(file: SourceFile, format_name: str, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Record]:
    number = 0
    label_names: Mapping[str, list[str]] | None = None
    try:
        for batch in batches:
            if label_names is None:
                label_names = _label_names(batch.schema)
                for column, names in label_names.items():
                    progress.say(
                        f'{file.name}: the numbers in "{column[:40]}" stand for the {len(names)} names of its schema'
                    )
            for values in batch.to_pylist():
                number += 1
                fields = {name: _value(value, label_names.get(name)) for name, value in values.items()}
                yield Record(file.name, number, fields, is_padded=True)
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
