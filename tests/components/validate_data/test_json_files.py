"""JSON in all the forms that people have: a row is a row wherever it stands, and a fault is said with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from components.validate_data.files import Record
from components.validate_data.readers import json_files, json_text

ROWS = [{"instruction": "Say h\u00e9\u2028", "output": "h\u00e9"}, {"instruction": "Add 1 and 2", "output": 3}]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
ReadFiles = Callable[..., list[Record]]
RefuseFiles = Callable[..., str]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fields(records: list[Record]) -> list[Any]:
    assert not [record.fault for record in records if record.fault]
    return [record.fields for record in records]


FORMS = {
    "a line each": lines(ROWS),
    "a line each, the last without its end": lines(ROWS).rstrip(),
    "blank lines between": lines(ROWS).replace("\n", "\n\n  \n"),
    "carriage returns and line feeds": lines(ROWS).replace("\n", "\r\n"),
    "carriage returns alone": lines(ROWS).replace("\n", "\r"),
    "a comma after each line": lines(ROWS).replace("}\n", "},\n"),
    "a line break lost": lines(ROWS).replace("}\n{", "}{"),
    "a mark where files were joined": lines(ROWS).replace("\n{", "\n\ufeff{"),
    "JSON text sequences": "".join("\x1e" + json.dumps(row) + "\n" for row in ROWS),
    "encoded twice": lines([json.dumps(row) for row in ROWS]),
    "a list": json.dumps(ROWS),
    "an indented list": json.dumps(ROWS, indent=4),
    "a list with a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "a list whose brackets stand beside rows": "[" + ",\n".join(map(json.dumps, ROWS)) + "]",
    "a list under a name with a row a line": '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}",
    "an object whose lists have an item a line": "\n".join(
        '{"instruction": '
        + json.dumps(row["instruction"])
        + ', "output": '
        + json.dumps(row["output"])
        + ', "tags": [\n{"a": 1},\n{"b": 2}\n]}'
        for row in ROWS
    ),
    "a comma after the last": json.dumps(ROWS, indent=2).replace("\n]", ",\n]"),
    "two lists": "".join(json.dumps([row], indent=1) + "\n" for row in ROWS),
    "indented objects one after another": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "indented objects with commas": ",\n".join(json.dumps(row, indent=2) for row in ROWS),
    "a list under a name": json.dumps({"version": 1, "data": ROWS, "licences": ["MIT"]}),
    "an indented list under a name": json.dumps({"data": ROWS, "version": {"of": ["it"]}}, indent=1),
    "a list under two names": json.dumps({"nlu": {"examples": ROWS, "synonyms": []}}),
    "one split of several, the others empty": json.dumps({"train": ROWS, "test": []}),
    "columns": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "pandas' columns": json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}),
    "pandas' split": json.dumps({"columns": list(ROWS[0]), "index": [0, 1], "data": [list(r.values()) for r in ROWS]}),
    "the hub's viewer": json.dumps(
        {"features": [{"name": "x"}], "rows": [{"row_idx": 0, "row": row, "truncated_cells": []} for row in ROWS]}
    ),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt"])
@pytest.mark.parametrize("form", FORMS)
def test_the_first_bytes_and_not_the_suffix_say_where_the_rows_are(
    read_files: ReadFiles, form: str, suffix: str
) -> None:
    # Plain text may begin like a JSON text.
    settings = {"format": "json"} if suffix == "txt" and form == "encoded twice" else {}
    rows = fields(read_files({f"a.{suffix}": FORMS[form]}, **settings))
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS


def test_rows_by_their_ids_are_rows(read_files: ReadFiles) -> None:
    rows = [{"question": str(i), "answer": str(i)} for i in range(3)]
    assert fields(read_files({"a.json": json.dumps({f"q{i}": row for i, row in enumerate(rows)})})) == rows


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"prompt": "hi", "completion": "ho", "tags": [{"name": "greeting"}]},
        {"title": "hi", "body": "ho"},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_row_is_that_row(read_files: ReadFiles, row: dict[str, Any], indent: int | None) -> None:
    """As in a folder with a file for each chat; the list of its turns is no list of rows."""
    files = {f"{i}.json": json.dumps(row, indent=indent) for i in range(2)}
    assert [(record.file, record.fields) for record in read_files(files)] == [("0.json", row), ("1.json", row)]


def test_a_field_that_the_line_names_makes_an_object_a_row(read_files: ReadFiles) -> None:
    row = {"vraag": "hoi", "antwoord": "dag", "bronnen": [{"id": 1}]}
    files = {"a.json": json.dumps(row)}
    assert fields(read_files(files, prompt_field="vraag", response_field="antwoord")) == [row]


@pytest.mark.parametrize("text", [lines([CHAT["messages"]] * 2), json.dumps([CHAT["messages"]] * 2)])
def test_a_chat_without_an_object_around_it_is_a_row(read_files: ReadFiles, text: str) -> None:
    assert fields(read_files({"a.json": text})) == [CHAT, CHAT]


def test_several_lists_are_refused_with_their_names_and_a_command(refuse_files: RefuseFiles) -> None:
    message = refuse_files({"my data.json": json.dumps({"train": ROWS, "test": ROWS})})
    assert "my data.json: the file holds 2 lists of objects (train, test)" in message
    assert "jq -c '.train[]' 'my data.json' > train.jsonl" in message
    assert "sources.eval_data" in message


def test_columns_of_different_lengths_are_refused(refuse_files: RefuseFiles) -> None:
    message = refuse_files({"a.json": json.dumps({"question": ["a", "b"], "reply": ["c"]})})
    assert "columns of different lengths (question 2, reply 1)" in message


def test_rows_are_numbered_by_line_or_one_by_one_where_they_share_a_line(read_files: ReadFiles) -> None:
    assert [r.number for r in read_files({"a.jsonl": "\n" + lines(ROWS)})] == [2, 3]
    assert [r.number for r in read_files({"a.jsonl": json.dumps(ROWS, indent=1)})] == [2, 6]
    assert [r.number for r in read_files({"a.jsonl": json.dumps(ROWS)})] == [1, 2]


def test_values_without_names_are_named_by_their_places(read_files: ReadFiles) -> None:
    records = read_files({"a.jsonl": '["a?", "b", 3]\n["c?", "d", null]\n'})
    assert [record.fields for record in records] == [{"0": "a?", "1": "b", "2": 3}, {"0": "c?", "1": "d", "2": None}]
    assert [record.fields for record in read_files({"a.jsonl": '"one"\n"two"\n'})] == [{"text": "one"}, {"text": "two"}]


def test_columns_are_rows_whatever_fields_are_named(read_files: ReadFiles) -> None:
    document = json.dumps({"text": ["a", "b", "c"], "label": ["x", "y", "x"]})
    expected = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "x"}]
    assert [record.fields for record in read_files({"a.json": document})] == expected
    records = read_files({"a.json": document}, prompt_field="text", response_field="label")
    assert [record.fields for record in records] == expected


def test_a_line_break_inside_of_a_text_is_named(refuse_files: RefuseFiles) -> None:
    message = refuse_files({"a.jsonl": '{"prompt": "one\ntwo", "completion": "three"}\n' * 3})
    assert message.startswith("a.jsonl:1: not JSON (Invalid control character at, column 16): a line break inside of")


def test_a_broken_line_is_a_bad_row_and_the_others_are_read(read_files: ReadFiles) -> None:
    broken = [
        '{"instruction": "a", "output": b}', '{"instruction": "a" "output"}', "{'instruction': 'a'}", "oops",
        '{"instruction": "a"} and more', "[" * 100_000, '{"a": "tab\there"}',
    ]  # fmt: skip
    text = "\n".join([json.dumps(ROWS[0]), *broken, json.dumps(ROWS[1])])
    records = read_files({"a.jsonl": text})
    assert [record.number for record in records] == list(range(1, 10))
    assert [record.fault for record in records] == [None, *["bad_json_line"] * 7, None]
    assert records[1].detail == "Expecting value, column 32"
    assert "single quotes" in records[3].detail
    assert [records[0].fields, records[-1].fields] == ROWS


def test_the_first_line_may_be_the_broken_one(read_files: ReadFiles) -> None:
    for first in ('{"instruction": "cut o', '{"a": [', '{"a": 1,', "# a comment", '{"a": "b" "c": "d"}', "{'a': 1}"):
        records = read_files({"a.jsonl": first + "\n" + lines(ROWS)})
        assert [record.fault for record in records] == ["bad_json_line", None, None]


def test_a_last_line_that_was_cut_off_says_so(read_files: ReadFiles, capsys: pytest.CaptureFixture[str]) -> None:
    records = read_files({"a.jsonl": lines(ROWS) + '{"instruction": "Tell me ab'})
    assert [record.fault for record in records] == [None, None, "bad_json_line"]
    assert "the file may be cut off, so fetch it again" in records[2].detail
    assert "a.jsonl:3: the last line is broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "fault", "detail"),
    [
        ('{"a": [-Infinity]}', "bad_json_line", "-Infinity is no JSON value"),
        ('{"a": 1e999}', "bad_json_line", "larger than a 64-bit float"),
        ('{"a": ' + "1" * 5000 + "}", "bad_json_line", "a number has 5,000 digits"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "bad_json_line", "nested deeper than 64"),
        ('{"a": 1, "b": 2, "a": 3}', "duplicate_key", '"a"'),
        ('{"turns": [{"role": "user", "role": "assistant"}]}', "duplicate_key", '"role"'),
        (r'{"a": "\ud83d"}', "bad_unicode", ""),
        (r'{"\udc00": ["\ud83d\ude00"]}', "bad_unicode", ""),
        ("[1, 2]", "not_an_object", "a list"),
        ("null", "not_an_object", "null"),
        ("true", "not_an_object", "true or false"),
        ('"{text"', "not_an_object", "a text"),
        (json.dumps('{"a": 1} b'), "not_an_object", "a text"),
        (json.dumps('{"a": 1, "a": 2}'), "duplicate_key", '"a"'),
        (json.dumps('{"a": Infinity}'), "bad_json_line", "Infinity is no JSON value"),
    ],
)
@pytest.mark.parametrize("form", ["{good}\n{value}\n{good}\n", "[{good},\n {value},\n {good}]"])
def test_a_value_that_cannot_be_a_row_is_a_fault_of_that_row(
    read_files: ReadFiles, value: str, fault: str, detail: str, form: str
) -> None:
    text = form.replace("{good}", json.dumps(ROWS[0])).replace("{value}", value)
    records = read_files({"a.json": text})
    assert [record.fault for record in records] == [None, fault, None]
    assert detail in records[1].detail
    assert records[1].number == 2


def test_a_pair_of_surrogates_is_one_character_and_no_fault(read_files: ReadFiles) -> None:
    assert fields(read_files({"a.jsonl": '{"a": "\\ud83d\\ude00"}\n{"a": "\\\\ud83d"}'})) == [
        {"a": "\U0001f600"},
        {"a": "\\ud83d"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": 2\n', "a.json:4: not JSON (Expecting ',' delimiter, column 1): the file ends inside the"),
        ('[{"a": "cut o', "so it was cut off; fetch it again"),
        ('[\n  {"a": 1}\n  {"a": 2}\n]', "a.json:3: not JSON (Expecting , or ], column 3)"),
        ("[\n{'a': 1},\n{'a': 2}]", "ast.literal_eval(sys.stdin.read())"),
        ("{'a': 1}\n{'a': 2}\n", "ast.literal_eval(line)"),
        ('{\n  // the rows\n  "a": 1}', 'a.json:2: not JSON (Expecting ", column 3): JSON has no comments'),
        ("[" * 100_000, "a.json:1: the value is nested too deep"),
        ("nothing like it", "a.json:1: not JSON (Expecting value, column 1); expected one JSON object a line"),
    ],
)
def test_a_document_that_is_not_json_is_refused_with_its_line(
    refuse_files: RefuseFiles, text: str, message: str
) -> None:
    assert message in refuse_files({"a.json": text})


def test_a_refusal_repeats_no_text_of_a_row(read_files: ReadFiles, refuse_files: RefuseFiles) -> None:
    assert "secret" not in refuse_files({"a.json": "[{'my secret': 1}]"})
    assert "secret" not in read_files({"a.json": lines(ROWS) + "{'my secret': 1}\n" + lines(ROWS)})[2].detail


def test_a_text_that_is_longer_than_a_part_that_is_read_at_once(
    read_files: ReadFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, white space, numbers and characters that a part ends in."""
    rows = [{"n": 10**i, "text": "h\u00e9\n" * i, "list": [1.5, None, True]} for i in range(12)]
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(json_text, "_CHUNK_CHARACTERS", size)
        for text in (
            json.dumps(rows),
            json.dumps({"meta": {"n": 12}, "data": rows}, indent=3),
            json.dumps(rows, indent=1),
        ):
            assert fields(read_files({"a.json": text})) == rows


def test_the_place_of_an_error_is_right_behind_the_first_part(
    refuse_files: RefuseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "_CHUNK_CHARACTERS", 8)
    text = json.dumps([{"a": i} for i in range(40)], indent=1).replace('"a": 33', '"a" 33')
    number = next(n for n, line in enumerate(text.split("\n"), 1) if '"a" 33' in line)
    assert f"a.json:{number}: not JSON (Expecting ':' delimiter, column 7)" in refuse_files({"a.json": text})
    one_line = json.dumps([{"a": i} for i in range(40)]).replace('"a": 33', '"a" 33')
    column = one_line.index('"a" 33') + 5
    assert f"a.json:1: not JSON (Expecting ':' delimiter, column {column})" in refuse_files({"a.json": one_line})


def test_a_document_of_one_long_line_is_not_read_as_a_line(
    read_files: ReadFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "_MAX_LINE_CHARACTERS", 10)
    for text in (json.dumps(ROWS), json.dumps({"data": ROWS}), lines(ROWS)):
        assert fields(read_files({"a.json": text})) == ROWS


def test_a_large_list_is_never_in_memory_as_a_whole(read_files: ReadFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    read = json_text.JsonText._read
    monkeypatch.setattr(json_text, "_CHUNK_CHARACTERS", 1024)
    monkeypatch.setattr(
        json_text.JsonText, "_read", lambda text, size: (read(text, size), sizes.append(len(text._buffer)))[0]
    )
    rows = [{"text": "x" * 100, "n": i} for i in range(2000)]
    for text in (json.dumps(rows), json.dumps({"data": rows}), json.dumps({"a": {"data": rows}}, indent=2)):
        assert fields(read_files({"a.json": text})) == rows
    assert max(sizes) < 5000 < len(text)


@pytest.mark.parametrize("form", ["{good}\n{value}\n{good}\n", "[{good},\n {value},\n {good}]"])
def test_nan_is_a_value_that_is_missing_as_pandas_writes_it(read_files: ReadFiles, form: str) -> None:
    text = form.replace("{good}", json.dumps(ROWS[0])).replace("{value}", '{"a": NaN, "b": [1, NaN]}')
    record = read_files({"a.json": text})[1]
    assert (record.fields, record.fault) == ({"a": None, "b": [1, None]}, None)


def test_lists_of_rows_without_names_are_refused_with_the_command_that_names_them(refuse_files: RefuseFiles) -> None:
    document = {"val": [["hi", "greet"]], "train": [["hi", "greet"], ["bye", "leave"]]}
    message = refuse_files({"a.json": json.dumps(document)})
    assert "2 lists of rows without names (val, train)" in message
    assert "jq -c '.train[] | {text: .[0], label: .[1]}' a.json > train.jsonl" in message
