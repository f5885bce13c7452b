"""Every format gives the same chat; fields are looked up by path; what is missing, misspelt or left out is said."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.raw_rows import RawRow, RowReader, read_rows
from components.validate_data.readers.record import Record
from qlora_retrain.config.data import DataConfig
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


def test_a_missing_column_is_named_with_those_found_and_the_near_match(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("txt,category\nhi,refund\n", encoding="utf-8")
    assert 'a.csv: there is no field "text"; the fields are: txt (text), category (text); did you mean txt?' in refusal(
        tmp_path, PAIRS
    )
    (tmp_path / "a.csv").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "Category": ["b"]}), tmp_path / "a.parquet")
    assert (
        'there is no field "category"; the fields are: text (text), Category (text); did you mean Category?'
        in refusal(tmp_path, PAIRS)
    )


def test_json_lines_that_all_lack_the_field_are_refused_like_a_missing_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"message": []}\n{"message": []}\n', encoding="utf-8")
    assert 'there is no field "messages"; the fields are: message (empty); did you mean message?' in refusal(
        tmp_path, DataConfig(messages_field="messages")
    )
    # Without a setting the near match is a setting.
    assert "the fields are: message (empty); set " in refusal(tmp_path)
    assert refusal(tmp_path).endswith("or data.messages_field: message")

    (tmp_path / "a.jsonl").write_text('{"messages": null, "id": 1}\n{"messages": null, "id": 2}\n', encoding="utf-8")
    assert 'no row has a value in the field "messages"' in refusal(tmp_path, DataConfig(messages_field="messages"))


def test_rows_that_cannot_even_be_looked_at_carry_their_fault(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": TURNS}), "[1]", '{"other": 1}', '{"messages": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.csv").write_text("messages\nnot json\n", encoding="utf-8")
    faults = [row.fault for row in rows(tmp_path)]
    assert faults == [None, "not_an_object", "missing_field", "missing_field", "bad_json"]


def test_a_row_of_its_own_shape_is_that_rows_fault_with_the_field(tmp_path: Path) -> None:
    lines = [{"question": "Open?", "answer": "No."}, {"question": "Open?"}, {"question": "Open?", "answer": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    raw_rows = rows(tmp_path)
    assert [(row.fault, row.detail) for row in raw_rows[1:]] == [("missing_field", 'the field "answer"')] * 2
    assert raw_rows[1].field == '"question" and "answer"'


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "expected"),
    [
        ({"translation": {"en": "cat", "de": "Katze"}}, "translation.en", "translation.de", ("cat", "Katze")),
        ({"q": "Where?", "answers": {"text": ["here", "there"]}}, "q", "answers.text.0", ("Where?", "here")),
        ({"meta": {"prompt": {"en": "Where?"}}, "a": "here"}, "meta.prompt.en", "a", ("Where?", "here")),
        # A field whose own name has a dot comes first, at every depth.
        ({"a.b": "own", "a": {"b": "path"}, "c": {"d.e": "own"}}, "a.b", "c.d.e", ("own", "own")),
        # A CSV file holds objects as text.
        ({"q": "Where?", "answers": "{'text': ['here'], 'start': [3]}"}, "q", "answers.text.0", ("Where?", "here")),
    ],
)
def test_fields_are_looked_up_by_path(
    tmp_path: Path, row: dict[str, object], prompt: str, answer: str, expected: tuple[str, str]
) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    messages = rows(tmp_path, DataConfig(prompt_field=prompt, response_field=answer))[0].messages
    assert tuple(turn["content"] for turn in messages) == expected  # type: ignore[attr-defined]


def test_a_misspelt_path_is_named_with_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"translation": {"en": "cat", "de": "Katze"}}\n' * 2, encoding="utf-8")
    message = refusal(tmp_path, DataConfig(prompt_field="translation.en", response_field="translation.dee"))
    assert (
        'there is no field "translation.dee"; the fields are: translation.en (text), translation.de (text)' in message
    )
    assert "did you mean translation.de?" in message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3.0"),
        (True, "true"),
        ({"b": [1], "a": "\u00e9"}, '{"b": [1], "a": "\u00e9"}'),
        ([2, "\u00e9"], '[2, "\u00e9"]'),
        (" x ", " x "),
    ],
)
def test_answers_that_are_no_texts_are_the_text_that_csv_or_json_would_hold(
    tmp_path: Path, value: object, text: str
) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": value, "category": value}) + "\n") * 2, encoding="utf-8")
    (tmp_path / "b.csv").write_text('text,category\n"{0}","{0}"\n'.format(text.replace('"', '""')), encoding="utf-8")
    contents = [[turn["content"] for turn in row.messages] for row in rows(tmp_path, PAIRS)]  # type: ignore[attr-defined]
    assert contents == [[text, text]] * 3


def test_an_empty_list_is_an_answer_and_no_prompt(tmp_path: Path) -> None:
    lines = [{"text": "Which cities?", "category": []}, {"text": [], "category": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = rows(tmp_path, PAIRS)
    assert first.messages[1]["content"] == "[]"  # type: ignore[index]
    assert second.fault == "empty_content"


def test_dates_and_decimals_of_parquet_are_texts_in_iso_form(tmp_path: Path) -> None:
    table = {
        "text": [datetime.date(2026, 1, 2), None],
        "category": [decimal.Decimal("12.50"), decimal.Decimal("1.00")],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    raw_rows = rows(tmp_path, PAIRS)
    assert [turn["content"] for turn in raw_rows[0].messages] == ["2026-01-02", "12.50"]  # type: ignore[attr-defined]
    assert raw_rows[1].fault == "missing_field"


def test_the_nulls_that_parquet_adds_to_turns_and_tools_are_not_learnt(tmp_path: Path) -> None:
    calls = [
        {"type": "function", "function": {"name": n, "arguments": a}} for n, a in (("f", {"x": 1}), ("g", {"y": "z"}))
    ]
    turns = [*TURNS, *({"role": "assistant", "content": None, "tool_calls": [call]} for call in calls)]
    tools = [
        {"type": "function", "function": {"name": n, "parameters": {"properties": p}}}
        for n, p in (("f", {"x": {"type": "number"}}), ("g", {"y": {"type": "string"}}))
    ]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns], "tools": [tools]}), tmp_path / "a.parquet")
    row = rows(tmp_path)[0]
    assert row.messages == [*TURNS, *({"role": "assistant", "content": "", "tool_calls": [call]} for call in calls)]
    assert row.tools == tools


def test_a_misspelt_setting_of_an_optional_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS, "sys": "Be kind.", "lang": "de"}) + "\n" * 2)
    config = DataConfig(system_field="sis", language_field="lang")
    assert "data.system_field: no row has a value in the field sis; did you mean sys?" in refusal(tmp_path, config)
    # Reserved rows may lack what only the training data has.
    assert next(RowReader(tmp_path, config, "golden_data").rows()).language == "de"
    assert rows(tmp_path, DataConfig(system_field="sys"))[0].messages == [
        {"role": "system", "content": "Be kind."},
        *TURNS,
    ]


def test_a_systems_turn_is_not_given_twice(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    lines = [
        {"messages": [system, *TURNS], "system": "Be kind."},
        {"messages": [system, *TURNS], "system": "Be brief."},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = (row.messages for row in rows(tmp_path))
    assert first == [system, *TURNS]
    assert second == [{"role": "system", "content": "Be brief."}, system, *TURNS]


def test_every_file_has_a_layout_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    (tmp_path / "b.csv").write_text("instruction,output\nh\u00e9,refund\n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([TURNS, TURNS]), encoding="utf-8")
    assert [row.messages for row in rows(tmp_path)] == [TURNS] * 4


def test_the_template_and_the_texts_of_a_row_stay_out_of_messages(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "top secret"}, {"role": "assistant", "content": 5, "x": "a b c d"}]}
    ]
    (tmp_path / "a.jsonl").write_text((json.dumps(lines[0]) + "\n") * 2)
    row = rows(tmp_path)[0]
    assert row.fault == "extra_field"
    assert "secret" not in row.detail + row.field
    assert "a b c d" not in row.detail


NAMES = (
    "messages conversations prompt instruction input output text chosen rejected tools system history role from value "
    "content tool_calls weight name arguments function type parts label image answers a.b"
).split()
LEAVES = st.none() | st.booleans() | st.integers(0, 2) | st.floats() | st.sampled_from(
    ["", "user", "gpt", "system", "function_call", "hi", "[]",
     "{'a': 1}", '[{"role": "user", "content": "x"}]', "\ud800"]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(NAMES), values, max_size=4),
    max_leaves=10,
)
CONFIGS = [
    DataConfig(),
    DataConfig(task="labels"),
    DataConfig(messages_field="messages"),
    DataConfig(prompt_template="{instruction}\n\n{a.b}", response_field="output", keep={"label": True}),
    DataConfig(text_field="text", answer_after="hi"),
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), min_size=1, max_size=3),
    st.sampled_from(CONFIGS),
    st.booleans(),
)
def test_any_values_give_rows_in_one_form_or_a_refusal(
    values: list[dict[str, object]], config: DataConfig, is_padded: bool
) -> None:
    records = [Record("a", i, fields, is_padded=is_padded) for i, fields in enumerate(values, 1)]
    with mock.patch("components.validate_data.raw_rows.read_files", return_value=iter([("a", iter(records))])):
        try:
            good_rows = [row for row in read_rows(Path(), config, "raw_data") if not row.fault]
        except UsageError:
            return
    keys = {"role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "weight"}
    for row in good_rows:
        for turn in row.messages:  # type: ignore[attr-defined]
            assert set(turn) <= keys
            assert turn["role"] in ("system", "user", "assistant", "tool")
            assert isinstance(turn["content"], str)
            calls = turn.get("tool_calls", [])
            assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
