"""Columns that nothing reads are named, and refused where the prompt repeats and they differ; others pass.

How often a prompt repeats and a column varies is counted a second way, with sets over the rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.raw_rows import RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

Read = Callable[..., RowReader]
PAIR = {"prompt_field": "question", "response_field": "query"}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def call(rows: list[dict[str, Any]], **settings: Any) -> RowReader:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        reader = RowReader(tmp_path, DataConfig(**settings), "raw_data")
        faults = {raw.fault for raw in reader.rows()}
        assert faults == {None}
        return reader

    return call


def refusal(read: Read, rows: list[dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(rows, **settings)
    return str(caught.value)


def test_a_schema_that_varies_while_the_question_repeats_is_refused_with_the_setting(read: Read) -> None:
    rows = [
        {"question": f"How many in {i // 3}?", "ddl_text": f"CREATE TABLE t{i} (id INTEGER)", "query": f"SELECT {i}"}
        for i in range(30)
    ]
    message = refusal(read, rows, **PAIR)
    questions = [row["question"] for row in rows]
    repeated = sum(questions.count(question) > 1 for question in questions)
    assert 'raw_data: nothing reads "ddl_text"' in message
    assert f"{repeated} of {len(rows)} rows have a prompt that another row has too" in message
    assert 'set data.prompt_template: "{question}\\n\\n{ddl_text}" and data.response_field: query' in message
    assert "or data.ignore_fields: [ddl_text]" in message

    # Both ways out.
    template = "{question}\n\n{ddl_text}"
    assert read(rows, prompt_template=template, response_field="query").unread == {}
    assert read(rows, **PAIR, ignore_fields=["ddl_text"]).unread == {}


def test_a_schema_is_refused_by_its_name_even_where_no_question_repeats(read: Read) -> None:
    rows = [
        {"question": f"How many in {i}?", "schema": "CREATE TABLE t (id INT)", "query": "SELECT 1"} for i in range(9)
    ]
    assert '"schema", which by the name may belong to the prompt' in refusal(read, rows, **PAIR)
    rows = [{"question": f"What is {i}?", "choices": ["one", "two"], "answer": 1} for i in range(9)]
    assert 'data.prompt_template: "{question}\\n\\n{choices}" and data.response_field: answer' in refusal(read, rows)


def test_a_word_on_which_the_answer_depends_is_refused_too(read: Read) -> None:
    rows = [
        {
            "sentence": f"Good food, slow staff {i // 2}.",
            "aspect": ("food", "staff")[i % 2],
            "polarity": ("good", "bad")[i % 2],
        }
        for i in range(20)
    ]
    message = refusal(read, rows, prompt_field="sentence", response_field="polarity")
    assert 'data.prompt_template: "{sentence}\\n\\n{aspect}"' in message


def test_chats_that_repeat_beside_a_text_that_varies_are_refused_with_a_system_field(read: Read) -> None:
    turns = [{"role": "user", "content": "Summarize it."}, {"role": "assistant", "content": "Done."}]
    rows = [{"messages": turns, "letter": f"Dear madam, this is letter {i}."} for i in range(9)]
    message = refusal(read, rows)
    assert "set data.system_field: letter" in message
    assert "9 of 9 rows" in message


def test_what_is_no_part_of_the_prompt_is_named_and_passes(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(0)
    rows = [
        {
            "question": f"How many in {i // 2}?",  # every one twice
            "query": f"SELECT {i}",
            "id": f"row-{i:04}",
            "url": f"https://example.org/{i}",
            "hash": f"{random.getrandbits(128):032x}",
            "created": f"2026-01-{i + 1:02} 10:00:00",
            "price": f"{i}.50",
            "licence": "CC BY 4.0 International",
            "rendered": f"Question: How many in {i // 2}? Answer: SELECT {i}",
            "tokens": i,
            "note": "" if i else "seen",
        }
        for i in range(20)
    ]
    reader = read(rows, **PAIR)
    filled = {name: sum(bool(str(row[name]).strip()) for row in rows) for name in rows[0]}
    expected = ("id", "url", "hash", "licence", "rendered", "note")
    assert reader.unread == {name: filled[name] for name in expected}
    assert '"note" (in 1 rows)' in capsys.readouterr().out


def test_prose_that_varies_beside_prompts_of_their_own_is_named_and_passes(read: Read) -> None:
    rows = [
        {"question": f"How many in {i}?", "query": "SELECT 1", "remark": f"Checked by hand in {i}."} for i in range(9)
    ]
    assert read(rows, **PAIR).unread == {"remark": 9}


def test_two_equal_rows_among_many_are_no_reason_to_refuse(read: Read) -> None:
    rows = [
        {"question": f"How many in {i}?", "query": "SELECT 1", "remark": f"Checked by hand, {i}."} for i in range(1500)
    ]
    rows[1]["question"] = rows[0]["question"]
    assert read(rows, **PAIR).unread == {"remark": 1500}


def test_whole_texts_are_never_refused_for_what_is_said_about_them(read: Read) -> None:
    rows = [{"text": f"The museum opened in {1900 + i}.", "title": f"A page about year {i}"} for i in range(9)]
    assert read(rows, text_field="text").unread == {"title": 9}


def test_the_unread_part_of_an_object_is_named_by_its_path(read: Read) -> None:
    rows = [{"translation": {"en": f"cat {i}", "de": "Katze", "fr": "un chat gris", "n": 3}} for i in range(9)]
    assert read(rows, prompt_field="translation.en", response_field="translation.de").unread == {"translation.fr": 9}


def test_choices_that_are_numbers_are_a_part_of_the_prompt_too(read: Read) -> None:
    rows = [{"question": f"What is {i} + 1?", "choices": [i, i + 1], "answer": 1} for i in range(9)]
    assert 'data.prompt_template: "{question}\\n\\n{choices}" and data.response_field: answer' in refusal(read, rows)


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (("sentence1", "sentence2"), "sentence2"),
        (("question_a", "question_b"), "question_b"),
        (("s", "option1"), "option1"),
    ],
)
def test_one_of_several_numbered_columns_is_half_of_what_was_asked(
    read: Read, names: tuple[str, str], unread: str
) -> None:
    rows = [{names[0]: f"How many in {i}?", names[1]: f"What number in {i}?", "label": i % 2} for i in range(9)]
    settings = {"prompt_field": names[0], "response_field": "label"}
    assert f'nothing reads "{unread}", which by the name may belong' in refusal(read, rows, **settings)
    assert read(rows, **settings, ignore_fields=[unread]).unread == {}


def test_a_text_that_many_rows_share_is_an_instruction_that_stands_in_front(read: Read) -> None:
    tasks = ["Say which town the text is about.", "Count the numbers in the text below."]
    rows = [{"question": f"Graz in {i}.", "query": f"{i}", "definition": tasks[i % 2]} for i in range(20)]
    message = refusal(read, rows, **PAIR)
    assert '"definition", and many rows share its text' in message
    assert 'data.prompt_template: "{definition}\\n\\n{question}"' in message
    # One for all rows says nothing that tells them apart; what is about the rows is no instruction; others differ.
    for name, values in (
        ("definition", tasks[:1]),
        ("original_question", tasks),
        ("remark", [f"{tasks[0]} {i}" for i in range(20)]),
    ):
        others = [{**row, "definition": None, name: values[i % len(values)]} for i, row in enumerate(rows)]
        assert read(others, **PAIR).unread == {name: 20}


@pytest.mark.parametrize("name", ["context", "documents", "schema"])
def test_a_context_beside_a_chat_is_refused_unless_the_chat_has_it(read: Read, name: str) -> None:
    texts = [f"The museum number {i} is open on Monday." for i in range(9)]
    chats = [[{"role": "user", "content": f"Which, {i}?"}, {"role": "assistant", "content": "All."}] for i in range(9)]
    rows = [{"messages": chat, name: [{"text": text}]} for chat, text in zip(chats, texts, strict=True)]
    message = refusal(read, rows)
    assert f'"{name}", which by the name may belong to the prompt; set data.system_field: {name}' in message
    assert read(rows, system_field=name).unread == {}

    for row, text in zip(rows, texts, strict=True):
        row["messages"] = [{"role": "system", "content": f"Use this: {text}"}, *row["messages"]]
    assert read(rows).unread == {name: 9}


def test_what_says_how_a_row_is_rendered_is_named(read: Read) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    row = {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}, "flags": {"a": False}}
    assert read([row] * 3).unread == {"chat_template_kwargs": 3}


def test_rows_that_each_have_other_columns_are_counted_and_listed_up_to_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}", "answer": "a", **{f"k{i}_{j}": "a text" for j in range(300)}} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = RowReader(tmp_path, DataConfig(), "raw_data")
    assert len(list(reader.rows())) == 10
    assert len(reader.unread) == 2000
    line = next(text for text in capsys.readouterr().out.split("\n") if "that nothing reads" in text)
    assert line.endswith('"k0_49" (in 1 rows) and 1950 more')
