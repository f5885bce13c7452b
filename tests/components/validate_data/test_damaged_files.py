"""Whatever a file holds, it gives records, or an error for a person that names it; never another exception."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.files import read_records
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

ROWS = [{"prompt": f"h\u00e9\u2028, {i}", "response": "a;\tb"} for i in range(5)]
PIECES = (
    b"{ } [ ] , : \" \\ \n \r \xef\xbb\xbf \0 \xe9 \xc3\xa9 \xed\xa0\xbd NaN 1e999 ' \x1e \xff\xfe \t ; | "
    b'{} [] {"a":1} '
    b"\\ud800 \xe2\x80\xa8 sep=;\n \x1f\x8b PAR1 PK\x03\x04"
).split(b" ")


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


def arrow() -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


FILES = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "b.json": json.dumps(ROWS, indent=1).encode(),
    "c.json": json.dumps({"about": {}, "data": ROWS}).encode(),
    "d.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "e.csv": ("prompt,response\n" + "".join(f'"{row["prompt"]}",{row["response"]}\n' for row in ROWS)).encode(),
    "f.tsv": "prompt\tresponse\nh\u00e9\t\"x\n".encode("utf-16"),
    "g.parquet": parquet(),
    "h.arrow": arrow(),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    edits=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 40), st.sampled_from(PIECES)), min_size=1, max_size=4
    ),
)
def test_a_damaged_file_gives_records_or_an_error_for_a_person(
    tmp_path_factory: pytest.TempPathFactory, name: str, edits: list[tuple[int, int, bytes]]
) -> None:
    data = FILES[name]
    for number, length, piece in edits:
        position = number % (len(data) + 1)
        data = data[:position] + piece + data[position + length :]
    path: Path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data)

    with contextlib.suppress(UsageError):
        for record in read_records(path.parent, DataConfig(), "raw_data"):
            assert (record.fields is None) == (record.fault is not None)
            # What a row holds can be written again.
            json.dumps(record.fields, ensure_ascii=False).encode()
