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
    "object_by_its_name": (
        {"question": QUESTION, "tokens": ["Is", "it"], "offsets": [0, 3], "sql": {"clause": [{"agg": 1}]}, "ok": True},
        QUESTION,
        '{"clause": [{"agg": 1}]}',
    ),
    "object_with_a_label_in_it": (
        {"id": "e1", "text": QUESTION, "expected": {"category": "spam", "urgent": False}, "note": "short"},
        QUESTION,
        '{"category": "spam", "urgent": false}',
    ),
    "answer_of_an_open_chat": (
        {"messages": [{"role": "user", "content": QUESTION}], "reference_answer": "MON-7"},
        QUESTION,
        "MON-7",
    ),
    "unknown_numbered_texts": ({"edu1": QUESTION, "edu2": ANSWER, "label": "none"}, f"{QUESTION}\n\n{ANSWER}", "none"),
    "options_by_a_longer_name": (
        {"question": QUESTION, "question_options": "A: yes\nB: no", "question_answer": "B"},
        f"{QUESTION}\n\nA: yes\nB: no",
        "B",
    ),
    "query_of_a_schema": (
        {"question": "How many?", "context": "CREATE TABLE t (id INT)", "query": "SELECT 1"},
        "How many?\n\nCREATE TABLE t (id INT)",
        "SELECT 1",
    ),
    "object": (
        {"description": CONTEXT, "data": {"weather": "hot", "wind": 5}},
        CONTEXT,
        '{"weather": "hot", "wind": 5}',
    ),
    "two_objects": (
        {"scenario": {"id": "s1", "ships": [{"kind": "ferry"}]}, "decision": {"level": "low", "reasoning": ANSWER}},
        '{"id": "s1", "ships": [{"kind": "ferry"}]}',
        '{"level": "low", ',
    ),
    "list": ({"business": QUESTION, "domains": ["a.app", "b.com"], "id": "7"}, QUESTION, '["a.app", "b.com"]'),
    "lists": ({"case_id": "c", "signs": ["cough", "fever"], "illness": ["flu"]}, '["cough", "fever"]', '["flu"]'),
    "chosen": (
        {"meta": {"target_os": {"family": "linux"}}, "prompt": {"user": QUESTION}, "chosen": ANSWER, "rejected": "?"},
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
            {"chosen": "\n\nUser: hello\n\nAssistant: hi", "rejected": "\n\nUser: hello\n\nAssistant: no"},
            "data.text_field: chosen and data.answer_after: 'Assistant:'",
        ),
        ({"conversation": "[USER] Hello\n[ASSISTANT] Hi"}, "and data.answer_after: '[ASSISTANT]'"),
        ("User: hello Assistant: hi </s>", "data.text_field: text and train.loss: all"),
        (["Open on Monday?", "No, it closes."], 'data.prompt_field: "0" and data.response_field: "1"'),
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
def test_whole_texts_and_categories_are_told_apart(tmp_path: Path, row: Any, hint: str) -> None:
    message = refusal(tmp_path, [row, row])
    assert message.startswith(
        "a.jsonl: no field is recognised as a chat, or as a prompt with its answer; the fields are: "
    )
    assert hint in message


def test_an_instruction_of_all_rows_is_named_with_what_it_is_about(tmp_path: Path) -> None:
    rows = [
        {
            "instruction": QUESTION,
            "source": f"{CONTEXT} {i}",
            "draft": f"{ANSWER} {i}",
            "corrected_output": f"{ANSWER}! {i}",
        }
        for i in range(MANY)
    ]
    assert (
        'data.prompt_template: "{instruction}\\n\\n{source}\\n\\n{draft}" and data.response_field: corrected_output'
        in (refusal(tmp_path, rows))
    )


def test_what_explains_a_label_is_not_shown_to_the_model(tmp_path: Path) -> None:
    rows = [{"text": f"{CONTEXT} {i}", "label": i % 2, "reason": f"{ANSWER} {i}"} for i in range(MANY)]
    assert "set data.task: labels if label holds categories, or data.prompt_field: text and" in refusal(tmp_path, rows)


def test_a_query_is_the_answer_to_the_only_other_text(tmp_path: Path) -> None:
    rows = [{"NL": f"{QUESTION} {i}", "Query": f"SELECT name FROM halls WHERE id = {i}"} for i in range(MANY)]
    assert refusal(tmp_path, rows).endswith("set data.prompt_field: NL and data.response_field: Query")
    rows = [{"query": f"{QUESTION} {i}", "text_de": f"{ANSWER} {i}"} for i in range(MANY)]
    assert refusal(tmp_path, rows).endswith("set data.prompt_field: query and data.response_field: text_de")


def test_one_question_about_many_texts_is_asked_in_front_of_them(tmp_path: Path) -> None:
    rows = [
        {"abstract": f"{CONTEXT} {i}", "question": QUESTION, "level": i, "why": f"{ANSWER} {i}"} for i in range(MANY)
    ]
    message = refusal(tmp_path, rows)
    assert message.endswith('data.prompt_template: "{question}\\n\\n{abstract}" and data.response_field: why')


def test_the_system_turn_of_an_object_is_named_with_its_prompt(tmp_path: Path) -> None:
    row = {"prompt": {"system": "You work at a museum.", "user": QUESTION}, "chosen": ANSWER, "rejected": "?"}
    settings = first_choice(refusal(tmp_path, [row, row]).partition("; ")[2])
    raw = next(RowReader(tmp_path, DataConfig(**settings), "raw_data").rows())
    contents = [(turn["role"], turn["content"]) for turn in raw.messages]  # type: ignore[attr-defined]
    assert contents == [("system", "You work at a museum."), ("user", QUESTION), ("assistant", ANSWER)]


def test_a_chat_under_a_name_of_its_own_is_named_with_its_roles(tmp_path: Path) -> None:
    turns = [{"turn_id": 0, "speaker": "DOCTOR", "transcript": QUESTION}, {"speaker": "PATIENT", "transcript": ANSWER}]
    message = refusal(tmp_path, [{"id": "1", "transcript": turns, "orders": [{"text": CONTEXT}]}] * 2)
    assert message.endswith("set data.messages_field: transcript, and data.roles: {DOCTOR: assistant, PATIENT: user}")
    settings = {"messages_field": "transcript", "roles": {"DOCTOR": "assistant", "PATIENT": "user"}}
    raw = next(RowReader(tmp_path, DataConfig(**settings), "raw_data").rows())
    assert raw.messages == [{"role": "assistant", "content": QUESTION}, {"role": "user", "content": ANSWER}]


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


def test_a_category_of_the_row_comes_before_one_of_an_object_in_it(tmp_path: Path) -> None:
    rows = [{"h": {"name": f"n{i % 3}"}, "relation": f"r{i % 4}", "text": f"{CONTEXT} {i}"} for i in range(MANY)]
    assert "data.prompt_field: text and data.response_field: relation" in refusal(tmp_path, rows)


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
