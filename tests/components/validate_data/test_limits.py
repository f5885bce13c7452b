"""Small files that would take the machine: each is refused by name, with its size and what to do, in little memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from components.validate_data.files import Record, read_records
from components.validate_data.readers import arrow_files, limits
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

MIB = 1 << 20
LONG = "a" * (4 * MIB)


def read(folder: Path, **settings: object) -> list[Record]:
    return list(read_records(folder, DataConfig.model_validate(settings), "raw_data"))


def repeated(text: str, rows: int) -> pyarrow.Array:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(numpy.zeros(rows, dtype="int32")), pyarrow.array([text]))


def a_dictionary(path: Path) -> None:
    """One text of 4 MiB, and 1,024 rows that name it."""
    table = pyarrow.table({"prompt": repeated(LONG, 1024), "answer": ["b"] * 1024})
    # Without Arrow's own schema, so that each row gets its copy when it is decoded.
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)


def prefixes(path: Path) -> None:
    """Each value is the one before it with nothing added."""
    columns = {"prompt": pyarrow.array([LONG] * 128), "answer": ["b"] * 128}
    encoding = {"prompt": "DELTA_BYTE_ARRAY", "answer": "PLAIN"}
    pyarrow.parquet.write_table(
        pyarrow.table(columns), path, compression="zstd", use_dictionary=False, column_encoding=encoding
    )


def a_page(path: Path) -> None:
    """One text of 64 MiB in one packed page."""
    table = pyarrow.table({"prompt": pyarrow.array(["a" * (64 * MIB)])})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def a_list(path: Path) -> None:
    """One row with a list of 20 million numbers."""
    values = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 20_000_000], pyarrow.int32()), numpy.zeros(20_000_000, "i1")
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "numbers": values}), path, compression="zstd")


def empty_rows(path: Path) -> None:
    """Thirty million rows without anything."""
    table = pyarrow.table({"prompt": pyarrow.array(numpy.zeros(30_000_000, "i1"))})
    pyarrow.parquet.write_table(table, path, compression="zstd")


def an_arrow_dictionary(path: Path) -> None:
    """The same as `a_dictionary`, in Arrow's own format, packed."""
    table = pyarrow.table({"prompt": repeated(LONG, 1024)})
    with pyarrow.ipc.new_file(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def views(path: Path) -> None:
    """A text of 4 MiB that 1,024 views share."""
    text = pyarrow.array([LONG], pyarrow.string_view())
    view = numpy.frombuffer(text.buffers()[1], "u1")[:16]
    buffers = [None, pyarrow.py_buffer(numpy.tile(view, 1024).tobytes()), *text.buffers()[2:]]
    column = pyarrow.Array.from_buffers(pyarrow.string_view(), 1024, buffers)
    table = pyarrow.table({"prompt": column})
    with pyarrow.ipc.new_file(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


# It reads a folder, and prints the error and by how much its memory grew.
PROGRAM = """
import sys
from pathlib import Path
from components.validate_data.files import read_records
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10
before = peak()
try:
    for record in read_records(Path(sys.argv[1]), DataConfig(), "raw_data"):
        pass
except UsageError as error:
    print(peak() - before, error)
"""


@pytest.mark.parametrize(
    ("write", "suffix", "message"),
    [
        (a_dictionary, "parquet", "bytes and unpacks to more than 134,"),
        (prefixes, "parquet", "bytes and unpacks to more than 134,"),
        (a_page, "parquet", "a.parquet:1: a row has more than 16,777,216 characters"),
        (a_list, "parquet", "a.parquet:1: a row has more than 16,777,216 characters"),
        (empty_rows, "parquet", "bytes and unpacks to more than 16"),
        (an_arrow_dictionary, "arrow", "bytes and unpacks to more than 134,"),
        (views, "arrow", "bytes and unpacks to more than 134,"),
    ],
)
def test_a_small_file_of_columns_that_holds_gigabytes_is_refused_in_little_memory(
    tmp_path: Path, write: Callable[[Path], None], suffix: str, message: str
) -> None:
    write(tmp_path / f"a.{suffix}")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ended = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=500)
    mib, _, error = ended.stdout.partition(" ")
    assert message in error, ended.stderr[-2000:]
    assert int(mib) < 700


def test_a_forged_size_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the header of the dictionary said that it is empty.
    monkeypatch.setattr(arrow_files, "_page_bytes", lambda header: 1)
    a_dictionary(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"need more than 512 MiB, and the file has \d+ bytes"):
        read(tmp_path)


def test_the_size_of_a_dictionary_is_read_from_its_page(tmp_path: Path) -> None:
    text = "x" * 12_345
    pyarrow.parquet.write_table(pyarrow.table({"a": [text, text]}), tmp_path / "a.parquet")
    column = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    data = (tmp_path / "a.parquet").read_bytes()
    # A value is stored behind its length of four bytes.
    assert arrow_files._page_bytes(data[column.dictionary_page_offset :][:16]) == 12_345 + 4
    assert arrow_files._page_bytes(b"\0\0\0") is None


def test_prompts_that_repeat_and_long_documents_are_no_bombs(tmp_path: Path) -> None:
    system = "You are helpful. " * 250
    rows = [{"prompt": system, "answer": str(i)} for i in range(20_000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    # 85 MB of text in a file of less than one.
    assert sum(len(str(r.fields["prompt"])) for r in read(tmp_path) if r.fields) == 20_000 * len(system)
    assert (tmp_path / "a.parquet").stat().st_size < MIB

    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x" * (9 * MIB), "answer": "y"}) + "\n")
    assert len(read(tmp_path)) == 1


def lines_of(text: str, count: int) -> Iterator[bytes]:
    return (text.encode() for _ in range(count))


@pytest.mark.parametrize(
    ("name", "begin", "part", "message"),
    [
        ("a.jsonl", "", '{"prompt": "a", "answer": "b"}\n', "bytes and unpacks to more than"),
        ("a.csv", "prompt,answer\n", "a" * 1000, "a.csv.zst:2: a row has more than"),
        ("a.csv", 'prompt,answer\n"', "a" * 999 + "\n", "a row has more than"),
        ("a.txt", "", "a" * 999 + "\n", "a.txt.zst:1: a row has more than"),
        ("a.json", '{"prompt": "', "a" * 1000, "the value that begins there has more than"),
        ("a.json", '{"b": 1, "a": {', '"a": {}, ', "the value that begins there has more than"),
        ("a.json", '{"prompt": [0],\n"b": {"0": {"c": [', "[[[[]]]],", "the value that begins there has more than"),
    ],
)
def test_a_packed_text_that_holds_too_much_is_refused(
    tmp_path: Path, name: str, begin: str, part: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_CHARACTERS", 100_000)
    monkeypatch.setattr(limits, "MAX_DOCUMENT_CHARACTERS", 300_000)
    monkeypatch.setattr(limits, "_FREE_CHARACTERS", 1_000_000 if name == "a.jsonl" else 10_000_000)
    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(tmp_path / f"{name}.zst"), "wb"), "zstd") as stream:
        stream.write(begin.encode())
        for _ in range(4):
            stream.write(part.encode() * (1_000_000 // len(part)))
    settings = {"format": "text", "text_field": "text"} if name.endswith("txt") else {}
    with pytest.raises(UsageError) as caught:
        read(tmp_path, **settings)
    assert message in str(caught.value)


def test_a_file_that_gzip_packs_well_is_no_bomb(tmp_path: Path) -> None:
    text = "".join(json.dumps({"prompt": f"ticket {i}", "answer": "yes"}) + "\n" for i in range(20_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(read(tmp_path)) == 20_000


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_what_is_nested_too_deep_is_that_rows_fault_or_the_files_and_never_a_crash(tmp_path: Path, depth: int) -> None:
    deep = '{"a": ' * depth + "1" + "}" * depth
    good = '{"prompt": "a", "answer": "b"}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{deep}\n{'[' * depth}\n{good}\n")
    faults = [record.fault for record in read(tmp_path)]
    assert faults == [None, "bad_json_line", "bad_json_line", None]

    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.json").write_text(f"[\n{good},\n{deep}]")
    if depth < 1000:
        assert [record.fault for record in read(tmp_path)] == [None, "bad_json_line"]
    else:
        with pytest.raises(UsageError, match=r"a\.json:3: the value is nested too deep to be read"):
            read(tmp_path)


def test_many_small_files_get_no_more_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FREE_CHARACTERS", 1_000_000)
    rows = gzip.compress(b'{"prompt": "a", "answer": "b"}\n' * 15_000)
    (tmp_path / "0.jsonl.gz").write_bytes(rows)
    assert len(read(tmp_path)) == 15_000
    for i in range(1, 50):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(b""))
    assert 250 * len(rows) + 1_000_000 // 50 < 15_000 * 31
    with pytest.raises(UsageError, match=r"0\.jsonl\.gz: the file has .* bytes and unpacks to more than"):
        read(tmp_path)


def test_a_parquet_file_of_very_many_columns_or_row_groups_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({f"c{i}": ["a"] for i in range(10_001)}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet: the file has 10,001 columns, and 10,000 are the most"):
        read(tmp_path)
    monkeypatch.setattr(arrow_files, "_MAX_FOOTER_BYTES", 1 << 20)
    with pytest.raises(UsageError, match=r"a\.parquet: the footer has 1,\d+,\d+ bytes, and 1,048,576 are the most"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_packed_lines_without_anything_count(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FREE_CHARACTERS", 2_000_000)
    first = b"prompt,answer\n" if name == "a.csv" else b'{"prompt": "a", "answer": "b"}\n'
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(first + b"\n" * 1_000_000))
    with pytest.raises(UsageError, match=r"\.gz: the file has .* bytes and unpacks to more than"):
        read(tmp_path)
