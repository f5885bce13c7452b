"""Files that are not recognised: the settings that the refusal names, put into the config, give the chat written here.

So each advice is taken as a person would take it, and what it leads to is compared with what should be learnt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.validate_data.field_leaves import quoted
from components.validate_data.raw_rows import RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

QUESTION, ANSWER = "Is the museum open on Monday?", "No, it closes on Mondays."
CONTEXT = "The museum is open from Tuesday to Sunday, from ten to five."
MANY = 40  # rows, where only many show that values come again


def refusal(folder: Path, rows: list[Any], **settings: Any) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        list(RowReader(folder, DataConfig(**settings), "raw_data").rows())
    return str(caught.value)


def first_choice(message: str) -> dict[str, Any]:
    """Return the settings of `data` in the last clause, each as it is named first; YAML reads their values."""
    clauses = re.findall(r'data\.(\w+): ("(?:[^"\\]|\\.)*"|\'[^\']*\'|.*?)(?= and | or |, |; | if |$)', message)
    settings: dict[str, Any] = {}
    for name, value in clauses:
        settings.setdefault(name, yaml.safe_load(value))
    return settings


# The row, and its prompt and answer.
PAIRS: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "typo": ({"promt": QUESTION, "completion": ANSWER}, QUESTION, ANSWER),
    "translation": ({"id": "1", "translation": {"en": "cat", "de": "Katze"}}, "cat", "Katze"),
    "summary": ({"id": "13", "dialogue": QUESTION, "summary": ANSWER}, QUESTION, ANSWER),
    "highlights": ({"article": CONTEXT, "highlights": ANSWER, "id": "af12"}, CONTEXT, ANSWER),
    "squad": (
        {"title": "Paris", "context": CONTEXT, "question": QUESTION, "answers": {"text": ["No"], "answer_start": [4]}},
        f"{QUESTION}\n\n{CONTEXT}",
        "No",
    ),
    "several_answers": ({"question": QUESTION, "answers": ["No", "Not on Mondays"]}, QUESTION, "No"),
    "answers_of_people": ({"input": QUESTION, "answer_doctor": ANSWER, "answer_model": "Yes."}, QUESTION, ANSWER),
    "self_instruct": (
        {"instruction": "Shorten it.", "instances": [{"input": CONTEXT, "output": ANSWER}], "is_label": False},
        f"Shorten it.\n\n{CONTEXT}",
        ANSWER,
    ),
    "completions": (
        {"instruction": QUESTION, "completions": [{"model": "a", "response": ANSWER}, {"model": "b", "response": "?"}]},
        QUESTION,
        ANSWER,
    ),
    "text_to_sql": (
        {"schema": "CREATE TABLE t (id INT)", "question": "How many?", "sql": "SELECT 1"},
        "How many?\n\nCREATE TABLE t (id INT)",
        "SELECT 1",
    ),
    "query_is_the_answer": ({"db_id": "t", "query": "SELECT 1", "question": "How many?"}, "How many?", "SELECT 1"),
    "post": ({"title": "Closed?", "body": QUESTION, "answer": ANSWER}, f"Closed?\n\n{QUESTION}", ANSWER),
    "best_answer": ({"question_title": QUESTION, "best_answer": ANSWER, "category": "open"}, QUESTION, ANSWER),
    "elasticsearch": ({"_id": "1", "_source": {"question": QUESTION, "answer": ANSWER}}, QUESTION, ANSWER),
    "choices": (
        {"id": "1", "question": QUESTION, "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "B"},
        QUESTION + '\n\n{"text": ["yes", "no"], "label": ["A", "B"]}',
        "B",
    ),
    "numbered_options": (
        {"sentence": "The _ is closed.", "option1": "museum", "option2": "park", "answer": "1"},
        "The _ is closed.\n\nmuseum\n\npark",
        "1",
    ),
    "numbered_sentences": ({"sentence1": QUESTION, "sentence2": ANSWER, "label": 1}, f"{QUESTION}\n\n{ANSWER}", "1"),
    "answers_to_choose_from": (
        {"context": CONTEXT, "question": QUESTION, "answer0": "Yes.", "answer1": ANSWER, "label": "1"},
        f"{CONTEXT}\n\n{QUESTION}\n\nYes.\n\n{ANSWER}",
        "1",
    ),
    "labelled_title_and_text": (
        {"label": 3, "title": "Closed on Mondays", "content": CONTEXT},
        f"Closed on Mondays\n\n{CONTEXT}",
        "3",
    ),
    "spans": ({"text": QUESTION, "entities": [{"start": 7, "end": 13, "label": "PLACE"}]}, QUESTION, "[{"),
    "expected_output": ({"input": [{"role": "user", "content": QUESTION}], "ideal": ANSWER}, QUESTION, ANSWER),
    "log_of_a_server": (
        {
            "request": {"model": "m", "messages": [{"role": "user", "content": QUESTION}]},
            "response": {"id": "1", "choices": [{"message": {"role": "assistant", "content": ANSWER}}]},
        },
        QUESTION,
        ANSWER,
    ),
    "body_of_a_log": (
        {
            "request_body": {"messages": [{"role": "user", "content": QUESTION}]},
            "response_body": {"choices": [{"message": {"role": "assistant", "content": ANSWER}}]},
        },
        QUESTION,
        ANSWER,
    ),
    "other_language": ({"Frage": QUESTION, "Antwort": ANSWER}, QUESTION, ANSWER),
    "source": ({"source": QUESTION, "target": ANSWER, "id": 3}, QUESTION, ANSWER),
    "src": ({"src": QUESTION, "tgt": CONTEXT, "src_lang": "en"}, QUESTION, CONTEXT),
    "name": ({"Name": QUESTION, "Reply (final)": ANSWER, "Status": "Done"}, QUESTION, ANSWER),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_the_first_setting_of_a_refusal_gives_the_prompt_and_the_answer(tmp_path: Path, kind: str) -> None:
    row, prompt, answer = PAIRS[kind]
    message = refusal(tmp_path, [row, row])
    settings = first_choice(message.partition("the fields are: ")[2].partition("; ")[2] or message)
    settings.pop("task", None)
    raw = next(RowReader(tmp_path, DataConfig(**settings), "raw_data").rows())
    assert raw.fault is None
    contents = [turn["content"] for turn in raw.messages]  # type: ignore[attr-defined]
    assert contents[0] == prompt
    assert contents[1][: len(answer)] == answer


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"review": "A film of two long hours.", "sentiment": "bad"},
            "data.task: labels if sentiment holds categories",
        ),
        (
            {"text": "### Human: hello\n### Assistant: hi"},
            "data.text_field: text and data.answer_after: '### Assistant:'",
        ),
        ({"text": "USER: hello ASSISTANT: hi</s>"}, "data.text_field: text and data.answer_after: 'ASSISTANT:'"),
        (
            {"chosen": "\n\nHuman: hello\n\nAssistant: hi", "rejected": "\n\nHuman: hello\n\nAssistant: no"},
            "data.text_field: chosen and data.answer_after: 'Assistant:'",
        ),
        ({"text": "The museum opened in 1907."}, "data.text_field: text and train.loss: all"),
        (
            {"text": CONTEXT, "url": "https://a/b", "timestamp": "2026-01-01"},
            "data.text_field: text and train.loss: all",
        ),
        (
            {"repo_name": "a/b", "content": "def f(): return 1", "size": "9"},
            "data.text_field: content and train.loss: all",
        ),
    ],
)
def test_whole_texts_and_categories_are_told_apart(tmp_path: Path, row: dict[str, Any], hint: str) -> None:
    message = refusal(tmp_path, [row, row])
    assert message.startswith(
        "a.jsonl: no field is recognised as a chat, or as a prompt with its answer; the fields are: "
    )
    assert hint in message


def test_a_value_of_few_kinds_beside_one_text_is_its_category(tmp_path: Path) -> None:
    rows = [{"id": i, "comment_text": f"{CONTEXT} {i}", "toxic": i % 2, "lang": "en"} for i in range(MANY)]
    message = refusal(tmp_path, rows)
    assert "set data.prompt_field: comment_text and data.response_field: toxic" in message
    assert "or set data.text_field: comment_text and train.loss: all" in message
    rows = [
        {"id": i, "question1": f"{QUESTION} {i}", "question2": f"{CONTEXT} {i}", "is_same": i % 2} for i in range(MANY)
    ]
    assert '"{question1}\\n\\n{question2}" and data.response_field: is_same' in refusal(tmp_path, rows)
    # Two texts beside a category are a pair, or what is labelled.
    rows = [{"Frage": f"{QUESTION} {i}", "Antwort": f"{ANSWER} {i}", "Sparte": f"S{i % 3}"} for i in range(MANY)]
    message = refusal(tmp_path, rows)
    assert "data.prompt_field: Frage and data.response_field: Antwort, or to learn Sparte, " in message
    assert '"{Frage}\\n\\n{Antwort}" and data.response_field: Sparte' in message


def test_what_is_named_as_a_label_and_is_free_text_is_none(tmp_path: Path) -> None:
    rows = [{"source": f"{QUESTION} {i}", "target": f"{ANSWER} {i}"} for i in range(MANY)]
    assert refusal(tmp_path, rows).endswith("set data.prompt_field: source and data.response_field: target")


def test_nothing_is_guessed_from_names_that_are_not_alike(tmp_path: Path) -> None:
    names = ("old_contents", "new_contents", "message")
    message = refusal(tmp_path, [{name: f"This is {name} number {i}" for name in names} for i in range(MANY)])
    assert message.endswith("; set data.prompt_field and data.response_field to two of them")
    assert refusal(tmp_path, [{"tokens": ["a", "b"], "tags": [1, 2]}] * 2).endswith(
        "to two of them; a path takes one item of a list, e.g. tokens.0"
    )


@pytest.mark.parametrize(
    "name", ["question", "Reply (final)", "Was ist das?", "问题", "0", "yes", "a: b", "#", "y", "a.b"]
)
def test_a_name_in_a_setting_is_read_as_that_name(name: str) -> None:
    assert yaml.safe_load(f"prompt_field: {quoted(name)}") == {"prompt_field": name}
