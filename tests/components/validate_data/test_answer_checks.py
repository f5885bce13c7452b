"""Answers that the prompt shows, or that hold their text in an object, are refused with the path; JSON answers pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.raw_rows import RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

Answers = Callable[..., list[str]]
TURN = {"role": "assistant", "content": "Open from ten to five."}


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    """Returns the answers that the rows teach."""

    def call(rows: list[dict[str, Any]], **settings: Any) -> list[str]:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        reader = RowReader(tmp_path, DataConfig(**settings), "raw_data")
        return [raw.messages[-1]["content"] for raw in reader.rows()]  # type: ignore[index]

    return call


def refusal(answers: Answers, rows: list[dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        answers(rows, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "path"),
    [
        ({"id": "x", "choices": [{"index": 0, "message": TURN}]}, "answer.choices.0.message"),
        ([{"user_id": "u1", "value": TURN["content"], "status": "submitted"}], "answer.0.value"),
        ({"text": [TURN["content"]], "answer_start": [3]}, "answer.text.0"),
        ({"text": TURN["content"], "score": 3}, "answer.text"),
        ([TURN["content"]], "answer.0"),
    ],
)
def test_a_text_within_an_answer_is_refused_with_its_path(answers: Answers, answer: object, path: str) -> None:
    rows = [{"question": f"When is it open, {i}?", "answer": answer} for i in range(4)]
    message = refusal(answers, rows)
    assert f"set data.prompt_field: question and data.response_field: {path}, or data.response_field: answer" in message
    # Both ways out.
    assert answers(rows, prompt_field="question", response_field=path) == [TURN["content"]] * 4
    assert answers(rows, prompt_field="question", response_field="answer") == [json.dumps(answer)] * 4


@pytest.mark.parametrize(
    "answer",
    [
        {"city": "Graz", "text": "open", "open": True},
        [{"type": "CITY", "text": "Graz"}, {"type": "DAY", "text": "Monday"}],
        ["Graz", "Leeds"],
        [[1, 2]],
        {"text": "open"},
        {"value": 5, "unit": "kg"},
    ],
)
def test_an_answer_that_is_json_is_learnt_as_json(answers: Answers, answer: object) -> None:
    rows = [{"question": f"When is it open, {i}?", "answer": answer} for i in range(4)]
    assert answers(rows) == [json.dumps(answer)] * 4


def test_a_prompt_that_ends_with_its_answer_is_refused_with_the_marker(answers: Answers) -> None:
    rows = [
        {
            "prompt": f"### Question:\nWhen, {i}?\n\n### Answer:\nOpen from ten to five, {i}.",
            "output": f"Open from ten to five, {i}.",
        }
        for i in range(8)
    ]
    message = refusal(answers, rows)
    assert '"prompt" ends with the text of "output"' in message
    assert "data.text_field: prompt and data.answer_after: '### Answer:'" in message
    # A field that a person names is looked at as well.
    assert refusal(answers, rows, prompt_field="prompt", response_field="output") == message
    assert "say so in data.prompt_template" in message
    template = {"prompt_template": "Copy the end of it:\n\n{prompt}", "response_field": "output"}
    assert answers(rows, **template) == [row["output"] for row in rows]
    assert answers(rows, text_field="prompt", answer_after="### Answer:") == [f"\n{row['output']}" for row in rows]


def test_a_prompt_that_shows_the_answer_is_no_choice_beside_one_that_does_not(answers: Answers) -> None:
    rows = [
        {
            "instruction": f"When, {i}?",
            "input": "",
            "output": f"Open from ten to five, {i}.",
            "prompt": f"When, {i}? Open from ten to five, {i}.",
        }
        for i in range(8)
    ]
    assert answers(rows) == [row["output"] for row in rows]


@pytest.mark.parametrize(
    "rows",
    [
        # The answer is one of those that the prompt lists.
        [{"prompt": f"Is {i} even or odd?\nAnswers: even, odd", "output": "odd"} for i in range(8)],
        # An instruction stands beside the text in which the answer is.
        [
            {
                "instruction": "Say the end.",
                "input": f"A {i}. It opens from ten to five, {i}.",
                "output": f"It opens from ten to five, {i}.",
            }
            for i in range(8)
        ],
        # The prompt is what to repeat.
        [{"prompt": f"Open from ten to five, {i}.", "output": f"Open from ten to five, {i}."} for i in range(8)],
        # The answer stands in the middle of a text.
        [{"prompt": f"Open from ten to five, {i}. When?", "output": f"Open from ten to five, {i}."} for i in range(8)],
    ],
)
def test_answers_that_a_prompt_may_end_with_pass(answers: Answers, rows: list[dict[str, Any]]) -> None:
    assert answers(rows) == [row["output"] for row in rows]
