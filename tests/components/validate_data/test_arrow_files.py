"""Parquet and Arrow as pandas, Spark and `datasets` write them; the values become those of JSON."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from components.validate_data.files import Record
from components.validate_data.readers import arrow_files

ReadFiles = Callable[..., list[Record]]
RefuseFiles = Callable[..., str]
ROWS = [{"text": "h\u00e9\u2028", "label": "a", "n": 1}, {"text": None, "label": "b", "n": None}]


def as_bytes(write: Callable[[Any], None]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    write(sink)
    return bytes(sink.getvalue())


def parquet(table: pyarrow.Table, **options: Any) -> bytes:
    return as_bytes(lambda sink: pyarrow.parquet.write_table(table, sink, **options))


def arrow_file(table: pyarrow.Table) -> bytes:
    return as_bytes(lambda sink: pyarrow.ipc.new_file(sink, table.schema).write_table(table))


def arrow_stream(table: pyarrow.Table) -> bytes:
    def write(sink: Any) -> None:
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)

    return as_bytes(write)


def feather(table: pyarrow.Table) -> bytes:
    return as_bytes(lambda sink: pyarrow.feather.write_feather(table, sink))


FORMS: dict[str, Callable[[pyarrow.Table], bytes]] = {
    "a.parquet": parquet,
    "a.pq": parquet,
    "part-0": parquet,
    "a.arrow": arrow_stream,
    "b.arrow": lambda table: as_bytes(lambda sink: _close(pyarrow.ipc.new_file(sink, table.schema), table)),
    "a.feather": feather,
}


def _close(writer: Any, table: pyarrow.Table) -> None:
    with writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(read_files: ReadFiles, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_files, "_MAX_BATCH_ROWS", 1)
    records = read_files({name: FORMS[name](pyarrow.Table.from_pylist(ROWS))})
    assert [record.fields for record in records] == ROWS
    assert [record.number for record in records] == [1, 2]


def test_values_that_json_has_not_become_text(read_files: ReadFiles) -> None:
    row = {
        "day": datetime.date(2026, 1, 31),
        "time": datetime.datetime(2026, 1, 31, 12, 30),
        "price": decimal.Decimal("3.10"),
        "nan": math.nan,
        "spark": "h\u00e9".encode(),
        "image": {"bytes": b"\x89PNG\r\n\xff", "path": None},
        "map": [("a", 1)],
        "category": "x",
    }
    schema = pyarrow.schema(
        [
            ("day", pyarrow.date32()), ("time", pyarrow.timestamp("us")), ("price", pyarrow.decimal128(5, 2)),
            ("nan", pyarrow.float64()), ("spark", pyarrow.binary()),
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("map", pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            ("category", pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
        ]
    )  # fmt: skip
    [record] = read_files({"a.parquet": parquet(pyarrow.Table.from_pylist([row], schema))})
    assert record.fields == {
        "day": "2026-01-31", "time": "2026-01-31T12:30:00", "price": "3.10", "nan": None, "spark": "h\u00e9",
        "image": {"bytes": b"", "path": None}, "map": {"a": 1}, "category": "x",
    }  # fmt: skip


def test_a_label_that_is_a_number_gets_the_name_that_the_schema_has_for_it(
    read_files: ReadFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `datasets` stores them; trained as they are, the answers would be numbers."""
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["card", "top_up"], "_type": "ClassLabel"},
    }
    table = pyarrow.table({"text": ["a", "b", "c"], "label": [1, 0, -1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for name, form in FORMS.items():
        labels = [record.fields["label"] for record in read_files({name: form(table)}) if record.fields]
        assert labels[:3] == ["top_up", "card", None]
    assert 'the numbers in "label" stand for the 2 names of its schema' in capsys.readouterr().out


def test_turns_that_are_stored_key_by_key_are_turns(read_files: ReadFiles) -> None:
    turns = {"from": ["human", "gpt"], "value": ["hi", "ho"]}
    [record] = read_files({"a.parquet": parquet(pyarrow.Table.from_pylist([{"conversations": turns}]))})
    assert record.fields == {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}


def test_a_saved_data_set_is_read_with_the_files_that_its_state_names(tmp_path: Path, read_files: ReadFiles) -> None:
    """Beside them `datasets` keeps what it computed earlier, which would repeat the rows."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "source"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    data = next(folder.rglob("data-*.arrow"))
    (data.parent / "cache-1234.arrow").write_bytes(data.read_bytes())
    assert {path.name for path in folder.rglob("*.json")} == {"dataset_dict.json", "dataset_info.json", "state.json"}
    assert [record.fields for record in read_files({})] == ROWS


def test_a_data_set_whose_rows_are_those_of_an_index_is_refused(refuse_files: RefuseFiles) -> None:
    state = json.dumps({"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "indices.arrow"}]})
    table = pyarrow.Table.from_pylist(ROWS)
    assert "flatten_indices()" in refuse_files({"d/state.json": state, "d/a.arrow": arrow_stream(table)})


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
def test_a_file_that_was_cut_off_is_refused(refuse_files: RefuseFiles, name: str) -> None:
    table = pyarrow.table({"text": [str(i) * 100 for i in range(1000)]})
    data = FORMS[name](table)
    assert refuse_files({name: data[:-4000]}).startswith(f"{name}: cannot be read as")


def test_a_file_of_another_format_or_none_is_refused(refuse_files: RefuseFiles) -> None:
    assert "a.parquet: expected parquet, which begins with PAR1; the file begins with b'text'" in refuse_files(
        {"a.parquet": "text,label\n"}
    )
    assert "the file is empty" in refuse_files({"a.parquet": ""})
    table = pyarrow.Table.from_pylist(ROWS)
    assert "the file is parquet, and data.format says csv" in refuse_files({"a.parquet": parquet(table)}, format="csv")
