"""Which files of a folder are read, and what is said about those that are not data."""

from __future__ import annotations

import bz2
import gzip
import importlib
import inspect
import io
import json
import lzma
import random
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from components.validate_data import checks
from components.validate_data.files import Record

ReadFiles = Callable[..., list[Record]]
RefuseFiles = Callable[..., str]
LINE = '{"text": "h\u00e9\u2028"}\n'
CSV = "text\nh\u00e9\u2028\n"


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return bytes(sink.getvalue())


def lz4(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "lz4") as packed:
        packed.write(data)
    return bytes(sink.getvalue())


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd, "lz4": lz4}


@pytest.mark.parametrize("program", PACKERS)
def test_packed_files_are_read_by_their_first_bytes(read_files: ReadFiles, program: str) -> None:
    pack = PACKERS[program]
    text, table = pack(LINE.encode()), pack(CSV.encode())
    files = {f"a.jsonl.{program}": text, "b.json": text, f"c.CSV.{program}": table, "d.csv": table}
    # Two packed files that were joined are one.
    files[f"e.jsonl.{program}"] = text + text
    assert [record.fields for record in read_files(files)] == [{"text": "h\u00e9\u2028"}] * 6


@pytest.mark.parametrize("program", PACKERS)
def test_a_packed_file_that_was_cut_off_is_refused(refuse_files: RefuseFiles, program: str) -> None:
    generator = random.Random(0)
    text = "".join(json.dumps({"text": generator.getrandbits(64)}) + "\n" for _ in range(20_000))
    packed = PACKERS[program](text.encode())
    message = refuse_files({f"a.jsonl.{program}": packed[: len(packed) * 3 // 4]})
    assert message.startswith(f"a.jsonl.{program}: cannot be unpacked with ")
    assert "fetch it again" in message


def test_folders_are_read_in_the_order_of_names_and_what_lies_beside_data_is_not(
    read_files: ReadFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = [
        "README.md", "LICENSE", "licence.txt", ".gitattributes", ".cache/x.jsonl", "dataset_infos.json", "_SUCCESS",
        "data/._a.jsonl", "data/.part-0.json.crc", "NOTICE", "load.py", "CITATION.cff",
    ]  # fmt: skip
    data = {"data/b/1.jsonl": LINE, "data/a.jsonl": LINE, "readme-questions.csv": CSV, "license.csv": CSV}
    records = read_files(dict.fromkeys(beside, "not data") | data)
    assert [record.file for record in records] == [
        "data/a.jsonl", "data/b/1.jsonl", "license.csv", "readme-questions.csv",
    ]  # fmt: skip
    output = capsys.readouterr().out
    assert output.count("raw_data: 12 files beside the data are not read: ") == 1
    assert "and 7 more" in output


def test_an_empty_part_of_a_spark_folder_is_whole_and_any_other_empty_file_is_refused(
    read_files: ReadFiles, refuse_files: RefuseFiles
) -> None:
    parts = {"out/part-00000.json": LINE, "out/part-00001.json": ""}
    assert refuse_files(parts).startswith("out/part-00001.json: the file has no rows")
    assert len(read_files(parts | {"out/_SUCCESS": ""})) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.json", "[\n]\n"), ("a.csv", ""),
        ("a.csv", "text\n"), ("a.csv", "sep=;\n"), ("a.txt", ""),
    ],
)  # fmt: skip
def test_a_file_without_rows_is_refused(refuse_files: RefuseFiles, name: str, text: str) -> None:
    settings = {"format": "text"} if name == "a.txt" else {}
    message = refuse_files({name: text}, **settings)
    assert message.startswith(f"{name}: the file has no rows")
    assert "sources.raw_data.files" in message


def test_a_source_without_files_is_refused(tmp_path: Path, refuse_files: RefuseFiles) -> None:
    (tmp_path / "source").mkdir()
    assert refuse_files({}).startswith("raw_data: there are no files; the source is an empty folder")
    assert refuse_files({"README.md": "x"}).startswith("raw_data: there are no files but README.md;")


def docx(part: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(part, "x")
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return stream.getvalue()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 132735\n"
PAGE = "\n<!-- proxy -->\n<!DOCTYPE html>\n<html><body>Log in</body></html>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "this is a git-lfs pointer, not the data: it stands for a file of 132,735 bytes. Run `git lfs pull`"),
        (PAGE, "this is a web page, probably of a login or an error"),
        ("404: Not Found", "this is a server's error message, '404: Not Found', in the place of the data"),
        ("Access to dataset a/b is restricted. You must be", "this is a server's error message"),
        (docx("data/a.jsonl"), "this is a zip archive; unpack it (`unzip "),
        (docx("xl/workbook.xml"), "this is an Excel workbook; save the sheet as CSV UTF-8"),
        (docx("word/document.xml"), "this is a Word document"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, "this is an old Excel or Word file"),
        (tar(), "this is a tar archive; unpack it (`tar -xf "),
        (gzip.compress(tar(), mtime=0), "this is a tar archive; unpack it (`tar -xf "),
        (b"SQLite format 3\x00" + b"\0" * 100, "this is an SQLite database"),
        (b"\x80\x04\x95.", "this is a pickle, which can run code when it is read"),
        (b"%PDF-1.7\n", "this is a PDF"),
        (b"\x93NUMPY\x01\0", "this is a NumPy array"),
        (b"Obj\x01\x04\0", "this is an Avro file"),
        (b"ORC\x11\0\0", "this is an ORC file"),
        (b"FEA1\0\0\0\0", "this is a Feather file of version 1"),
        (b'<?xml version="1.0"?><rows/>', "this is XML"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "this is a server's error message"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.bin"])
def test_what_is_no_data_is_refused_by_its_name_whatever_its_suffix(
    refuse_files: RefuseFiles, name: str, content: bytes | str, message: str
) -> None:
    assert refuse_files({name: content}).startswith(f"{name}: {message}")


def test_text_that_begins_like_a_mark_is_text(read_files: ReadFiles) -> None:
    assert read_files({"a.csv": "ORCID,text\n1,hi\n"})[0].fields == {"ORCID": "1", "text": "hi"}
    assert read_files({"b.csv": "Obj\tid\n1\t2\n", "a.csv": "RIFF\nx\n"})[0].fields == {"RIFF": "x"}


def test_a_file_whose_format_cannot_be_told_is_refused_before_any_is_read(refuse_files: RefuseFiles) -> None:
    message = refuse_files({"a.jsonl": '{"text": "h"', "sub/notes": "hello\nworld\n"}).split("\n")[-1]
    assert message.startswith("raw_data: sub/notes: its format cannot be told by its suffix or its first bytes")
    assert "set data.format: text and data.text_field: text" in message
    assert "sources.raw_data.files" in message
    assert "set data.format: csv" in refuse_files({"sub/notes": "text\tlabel\nhi\tho\n"})


def test_the_configured_format_wins_over_the_suffix(read_files: ReadFiles) -> None:
    assert read_files({"a.txt": "text,label\nhi,refund\n"}, format="csv")[0].fields == {"text": "hi", "label": "refund"}
    assert read_files({"a.txt": LINE}, format="jsonl")[0].fields == {"text": "h\u00e9\u2028"}


def test_plain_text_is_cut_at_blank_lines(read_files: ReadFiles) -> None:
    text = "\n\nOne\u2028 text\nof two lines\n \n\nAnother\x0c one\r\n"
    records = read_files({"a.txt": text, "b.md": "A third"}, format="text")
    assert [(record.number, record.fields) for record in records] == [
        (3, {"text": "One\u2028 text\nof two lines"}), (7, {"text": "Another\x0c one"}), (1, {"text": "A third"}),
    ]  # fmt: skip
    assert read_files({"a.txt": text, "b.md": "A third"}, format="text", text_field="body")[2].fields == {
        "body": "A third"
    }


def test_a_field_for_whole_texts_makes_a_text_file_plain_text(read_files: ReadFiles) -> None:
    assert read_files({"a.txt": "One\n\ntwo"}, text_field="text")[1].fields == {"text": "two"}
    # JSON lines are what they are.
    assert read_files({"b.txt": LINE}, text_field="text")[2].fields == {"text": "h\u00e9\u2028"}


def test_plain_text_with_an_answer_is_one_row_a_file(read_files: ReadFiles) -> None:
    """A prompt and its answer mostly have a blank line between them."""
    text = "### Question:\nWhy?\n\n### Answer:\nBecause.\n\n"
    [record] = read_files({"a.txt": text}, format="text", text_field="text", answer_after="### Answer:")
    assert record.fields == {"text": "### Question:\nWhy?\n\n### Answer:\nBecause."}


def test_files_for_evaluation_among_others_are_named(read_files: ReadFiles, capsys: pytest.CaptureFixture[str]) -> None:
    read_files({"train.jsonl": LINE, "test.jsonl": LINE})
    assert "raw_data: test.jsonl will be trained on too, although the name says evaluation" in capsys.readouterr().out
    read_files({"train.jsonl": LINE, "test.jsonl": LINE, "latest-contest.jsonl": LINE})
    assert "contest" not in capsys.readouterr().out.replace("test.jsonl", "")


def test_a_file_for_evaluation_alone_is_what_the_line_names(
    read_files: ReadFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    read_files({"test.jsonl": LINE})
    assert capsys.readouterr().out == ""


def test_every_fault_that_a_reader_gives_has_its_words() -> None:
    faults = set()
    readers = ("json_text", "json_files", "json_rows", "csv_files", "arrow_files", "text_files")
    for name in (*(f"readers.{name}" for name in readers), "files"):
        source = inspect.getsource(importlib.import_module(f"components.validate_data.{name}"))
        faults |= set(re.findall(r'"([a-z]+_[a-z_]+)"', source))
    assert faults & checks.REASONS.keys() == {
        "bad_json_line", "not_an_object", "duplicate_key", "bad_unicode", "ragged_row", "repeated_headers",
    }  # fmt: skip
    assert (
        not {fault for fault in faults if fault.startswith(("bad_", "not_", "ragged", "duplicate"))}
        - checks.REASONS.keys()
    )
