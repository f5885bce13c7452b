"""Files are read strictly: UTF-8, whole lines, the right columns; what is wrong is said with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from components.validate_data.raw_rows import RawRow, read_rows
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core.errors import UsageError

CHATS = DataConfig()
PAIRS = DataConfig(prompt_field="text", response_field="category")
TURNS = [{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": "refund"}]


def rows(folder: Path, config: DataConfig = CHATS) -> list[RawRow]:
    return list(read_rows(folder, config, "raw_data"))


def refusal(folder: Path, config: DataConfig = CHATS) -> str:
    with pytest.raises(UsageError) as caught:
        rows(folder, config)
    return str(caught.value)


def test_every_format_reads_as_the_same_chat(tmp_path: Path) -> None:
    line = json.dumps({"messages": TURNS})
    for name in ("a.jsonl", "b.ndjson", "c.json-lines"):
        (tmp_path / name).write_text(line + "\n", encoding="utf-8")
    (tmp_path / "d.csv").write_text('messages,id\n"{}",7\n'.format(json.dumps(TURNS).replace('"', '""')), "utf-8")
    for name, value in (("e.parquet", TURNS), ("f.parquet", json.dumps(TURNS))):
        pyarrow.parquet.write_table(pyarrow.table({"messages": [value]}), tmp_path / name)
    raw_rows = rows(tmp_path)

    assert [row.messages for row in raw_rows] == [TURNS] * 6
    assert [row.file[0] for row in raw_rows] == list("abcdef")
    assert [row.number for row in raw_rows] == [1, 1, 1, 2, 1, 1]


def test_prompt_and_response_become_two_turns_in_every_format(tmp_path: Path) -> None:
    record = {"text": "h\u00e9", "category": "refund", "other": 3}
    (tmp_path / "a.jsonl").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "b.csv").write_text("other,text,category\n3,h\u00e9,refund\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({k: [v] for k, v in record.items()}), tmp_path / "c.parquet")
    assert [row.messages for row in rows(tmp_path, PAIRS)] == [TURNS] * 3


def test_the_configured_format_wins_over_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text,category\nhi,refund\n", encoding="utf-8")
    config = PAIRS.model_copy(update={"format": "csv"})
    assert [row.number for row in rows(tmp_path, config)] == [2]


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.pkl").write_bytes(b"\x80\x04.")
    assert refusal(tmp_path).startswith("raw_data: sub/model.pkl: expected a file that ends in .jsonl")


def test_a_byte_order_mark_is_not_part_of_the_first_field(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,category\r\nhi,refund\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi", "category": "refund"}\n')
    assert [row.fault for row in rows(tmp_path, PAIRS)] == [None, None]


def test_latin_1_is_refused_with_its_line_and_byte(tmp_path: Path) -> None:
    data = "text,category\nfirst,refund\ncaf\u00e9,refund\n".encode("latin-1")
    (tmp_path / "a.csv").write_bytes(data)
    assert f"a.csv:3: byte {data.index(0xE9)} of the file (0xe9) is not UTF-8" in refusal(tmp_path, PAIRS)
    assert "iconv" in refusal(tmp_path, PAIRS)


@pytest.mark.parametrize("last", ['{"messages": [{"ro', "[" * 100_000, "{'messages': []}", "1" * 5000])
def test_a_line_that_is_not_json_is_refused_with_its_number(tmp_path: Path, last: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n\n" + last, encoding="utf-8")
    assert refusal(tmp_path).startswith("a.jsonl:3: the line is not JSON")
    # A refusal does not repeat the text of a row.
    assert "messages': []" not in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", "messages\n")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{name}: the file has no rows")


def test_a_parquet_file_without_rows_and_a_source_without_files_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith("raw_data: there are no files")
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet"
    )
    assert refusal(tmp_path).startswith("a.parquet: the file has no rows")


def test_a_missing_column_is_named_with_those_found_and_the_near_match(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("txt,category\nhi,refund\n", encoding="utf-8")
    assert 'a.csv: there is no field "text"; the fields are: txt, category; did you mean txt?' in refusal(
        tmp_path, PAIRS
    )
    (tmp_path / "a.csv").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "Category": ["b"]}), tmp_path / "a.parquet")
    assert 'there is no field "category"; the fields are: text, Category; did you mean Category?' in refusal(
        tmp_path, PAIRS
    )


def test_json_lines_that_all_lack_the_field_are_refused_like_a_missing_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"message": []}\n{"message": []}\n', encoding="utf-8")
    assert 'no row has a value for the field "messages"; the fields are: message; did you mean message?' in refusal(
        tmp_path
    )


def test_semicolons_and_repeated_columns_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;category\nhi;refund\n", encoding="utf-8")
    assert "separate the fields by commas" in refusal(tmp_path, PAIRS)
    (tmp_path / "a.csv").write_text("text,category,text\nhi,refund,ho\n", encoding="utf-8")
    assert 'more than one column has the name "text"' in refusal(tmp_path, PAIRS)


def test_csv_rows_are_numbered_by_the_line_they_begin_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,category\n"two\nlines",refund\n\nlast,login\n', encoding="utf-8")
    raw_rows = rows(tmp_path, PAIRS)
    assert [row.number for row in raw_rows] == [2, 5]
    assert raw_rows[0].messages[0]["content"] == "two\nlines"  # type: ignore[index]


def test_ragged_rows_are_faults_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,category\na,b,c\nhi,refund\nx\n", encoding="utf-8")
    assert [row.fault for row in rows(tmp_path, PAIRS)] == ["ragged_row", None, "ragged_row"]


def test_an_open_quote_is_refused_at_the_row_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,category\nhi,refund\n"never closed,login\nx,y\n', encoding="utf-8")
    assert refusal(tmp_path, PAIRS).startswith("a.csv:3: not valid CSV")


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["[]"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert refusal(tmp_path).startswith("a.parquet: cannot be read as Parquet")


def test_rows_that_cannot_even_be_looked_at_carry_their_fault(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": TURNS}), "[1]", '{"other": 1}', '{"messages": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.csv").write_text("messages\nnot json\n", encoding="utf-8")
    faults = [row.fault for row in rows(tmp_path)]
    assert faults == [None, "not_an_object", "missing_field", "missing_field", "bad_json"]
