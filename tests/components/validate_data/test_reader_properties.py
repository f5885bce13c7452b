"""Rows that are written in a form that is read are read back; whatever bytes a file has, it gives rows or a refusal.

`test_damaged_files.py` edits good files; here the rows and the bytes are made by chance.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from components.validate_data.checks import check_row
from components.validate_data.files import read_records
from components.validate_data.raw_rows import read_rows
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

Rows = list[dict[str, str]]
Writer = Callable[[Rows], bytes]
CONFIG = DataConfig(prompt_field="prompt", response_field="response")
ALPHABET = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
# Texts that readers might take for something else than the value of a field.
ODD = st.sampled_from(
    [
        "",
        " ",
        '"',
        '""',
        "'",
        ",",
        "a,b",
        ";",
        "|",
        "\t",
        "a\tb",
        "\n",
        "a\nb",
        "\r",
        "\r\n",
        "\\",
        '\\"',
        "{}",
        '{"a": 1}',
        "[",
        "null",
        "true",
        "1",
        "1.0",
        "NaN",
        "\ufeff",
        "\u2028",
        "\x0b",
        "\x1e",
        "sep=,",
        "#",
        "=1+1",
        "N/A",
        " a ",
        "é",
    ]
)
TEXTS = st.one_of(ODD, st.text(ALPHABET, max_size=20), st.text('ab",;|\t\n\r \\{}[]:\u00e9', max_size=12))
FIELDS = ("prompt", "response", "note")
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(FIELDS, TEXTS)), min_size=1, max_size=8)


def jsonl(rows: Rows, *, ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


def separated(rows: Rows, delimiter: str, quoting: int, line_end: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=line_end)  # type: ignore[arg-type]
    writer.writerows([list(FIELDS), *([row[name] for name in FIELDS] for row in rows)])
    return stream.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def arrow(rows: Rows) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


WRITERS: dict[str, Writer] = {
    "a.jsonl": jsonl,
    "b.jsonl": lambda rows: jsonl(rows, ascii_only=True),
    "c.json": lambda rows: json.dumps(rows).encode(),
    "d.json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "e.json": lambda rows: json.dumps({"data": rows}).encode(),
    "f.csv": lambda rows: separated(rows, ",", csv.QUOTE_MINIMAL, "\r\n"),
    "g.csv": lambda rows: separated(rows, ",", csv.QUOTE_ALL, "\n"),
    "h.csv": lambda rows: separated(rows, ";", csv.QUOTE_ALL, "\n"),
    "i.tsv": lambda rows: separated(rows, "\t", csv.QUOTE_ALL, "\n"),
    "j.parquet": parquet,
    "k.arrow": arrow,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")


@settings(max_examples=120, deadline=None)
@given(ROWS, st.sampled_from(sorted(WRITERS)), st.sampled_from(sorted(PACKERS)), st.sampled_from(ENCODINGS))
def test_rows_are_read_back_from_every_form_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, name: str, suffix: str, encoding: str
) -> None:
    # Such a file is refused, since a quote that does not close looks like this.
    assume(name != "i.tsv" or not any({"\n", "\t"} <= {*text} for row in rows for text in row.values()))
    data = WRITERS[name](rows)
    is_table = name.endswith((".parquet", ".arrow"))
    if not is_table:
        data = PACKERS[suffix](data.decode().encode(encoding))
    folder = tmp_path_factory.mktemp("rows")
    (folder / (name if is_table else name + suffix)).write_bytes(data)

    assert [record.fields for record in read_records(folder, CONFIG, "raw_data")] == rows


HEADS = st.sampled_from(
    [
        b"",
        b"\x1f\x8b\x08",
        b"BZh9",
        b"\xfd7zXZ\x00",
        b"(\xb5/\xfd",
        b'\x04"M\x18',
        b"PAR1",
        b"ARROW1\x00\x00",
        b"\xff\xff\xff\xff",
        b"\xff\xfe",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"[{",
        b'{"a":',
        b"a,b\n",
        b'"',
        b"sep=;\n",
        b"PK\x03\x04",
    ]
)
NAMES = (*WRITERS, "l.txt", "m.json.gz", "n.csv.zst", "o.feather", "p", "state.json", "q.bin", "r.lz4")
PIECES = st.sampled_from(
    [b'{"prompt":"a","response":"b"}\n', b"\n", b",", b'"', b"]", b"}", b"\0", b"\xe9", b"prompt,response\n"]
)
BYTES = st.builds(
    lambda head, parts: head + b"".join(parts), HEADS, st.lists(st.one_of(st.binary(max_size=30), PIECES), max_size=6)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), BYTES), min_size=1, max_size=3), st.booleans())
@example([("a.jsonl", b"[{"), ("f.csv", b'"')], False)
@example([("j.parquet", b"PAR1" + b"\0" * 40 + b"PAR1")], False)
@example([("k.arrow", b"ARROW1\0\0" + b"\xff" * 60 + b"ARROW1")], True)
def test_any_bytes_are_rows_or_an_error_for_a_person(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]], is_configured: bool
) -> None:
    folder: Path = tmp_path_factory.mktemp("bytes")
    for name, data in files:
        (folder / name).write_bytes(data)
    config = CONFIG if is_configured else DataConfig(text_field="text", answer_after="#")
    try:
        rows = [check_row(raw, config) for raw in read_rows(folder, config, "raw_data")]
    except UsageError:
        return
    assert all(row.messages or row.reason for row in rows)
