"""All bad files of a data set are named at once, each with what is wrong and where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from components.validate_data.gate_rows import read_gate_rows
from components.validate_data.raw_rows import read_rows
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.chat import load_tokenizer

GOOD = b'{"prompt": "p", "response": "r"}\n'
BAD = {
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-9], "cut.jsonl.gz: cannot be unpacked with gzip"),
    "latin.csv": ("prompt,response\ncaf\u00e9,x\n".encode("latin-1"), "latin.csv:2: byte 19 of the file (0xe9"),
    "empty.jsonl": (b"", "empty.jsonl: the file has no rows"),
    "sub/no.parquet": (b"{}", "sub/no.parquet: expected parquet, which begins with PAR1"),
    "cut.json": (b'[{"prompt": "p", "response": "r"},\n {"prompt": "p"', "cut.json:2: not JSON"),
    "layout.jsonl": (b'{"a": 1, "b": 2}\n' * 3, "layout.jsonl: "),
    "quotes.csv": (b'prompt,response\n"a,b\n', "quotes.csv:2: not valid CSV"),
    "page.html": (b"<!doctype html><html></html>", "page.html: this is a web page"),
    "double.csv": (b"prompt,prompt\na,b\n", "double.csv:1: more than one column"),
}


def refuse(folder: Path, files: dict[str, bytes], **settings: object) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        list(read_rows(folder, DataConfig(**settings), "raw_data"))
    return str(caught.value)


def test_one_error_names_every_bad_file_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    good = {"a.jsonl": GOOD * 5, "z.jsonl": GOOD * 5}
    head, *lines = refuse(tmp_path, good | {name: data for name, (data, _) in BAD.items()}).split("\n")
    assert head == "raw_data: 9 of 11 files cannot be used:"
    assert len(lines) == len(BAD)
    for line, (_, beginning) in zip(lines, sorted((name, words) for name, (_, words) in BAD.items()), strict=True):
        assert beginning in line


@pytest.mark.parametrize("name", sorted(BAD))
def test_the_error_of_a_single_file_is_the_one_of_the_list(tmp_path: Path, name: str) -> None:
    data, words = BAD[name]
    message = refuse(tmp_path, {name: data, "z.jsonl": GOOD})
    assert words in message
    assert "files cannot be used" not in message


def test_a_field_that_some_files_lack_is_said_of_each(tmp_path: Path) -> None:
    files = {
        f"{i}.jsonl": json.dumps({"prompt" if i % 2 else "promt": "p", "response": "r"}).encode() for i in range(4)
    }
    message = refuse(tmp_path, files, prompt_field="prompt", response_field="response")
    assert message.startswith("raw_data: 2 of 4 files cannot be used:\n0.jsonl: there is no field ")
    assert '\n2.jsonl: there is no field "prompt"; the fields are: ' in message


def test_of_very_many_files_the_first_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    lines = refuse(tmp_path, {f"{i:03}.jsonl": b"" for i in range(130)}).split("\n")
    assert lines[0] == "raw_data: 130 of 130 files cannot be used:"
    assert [line[:9] for line in lines[1:21]] == [f"{i:03}.jsonl" for i in range(20)]
    assert lines[21:] == ["and 110 more"]


def test_the_files_of_all_sources_are_in_one_error(tmp_path: Path, tiny_model: Path) -> None:
    for source in ("raw", "golden"):
        (tmp_path / source).mkdir()
        (tmp_path / source / "a.jsonl").write_bytes(b"")
    (tmp_path / "raw" / "b.csv").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        read_gate_rows(DataConfig(), load_tokenizer(tiny_model), tmp_path / "raw", tmp_path / "golden", None)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("golden_data: a.jsonl: the file has no rows")
    assert lines[1] == "raw_data: 2 of 2 files cannot be used:"
