"""Rows are repeats or contradictions by what the model is given, to the letter."""

from __future__ import annotations

from typing import Any

import pytest

from components.validate_data.checks import Row
from components.validate_data.repeats import quarantine_repeats
from qlora_retrain.config.data import DataConfig

TEXT, LABELS = DataConfig(), DataConfig(task="labels")
TOOLS = [{"type": "function", "function": {"name": "track"}}]


def row(prompt: str, answer: str = "refund", system: str | None = None, **fields: Any) -> Row:
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer, **fields}]
    return Row("a.jsonl", 1, turns, "0" * 12)


def reasons(rows: list[Row], config: DataConfig) -> list[str | None]:
    quarantine_repeats(rows, config)
    return [item.reason for item in rows]


def test_an_exact_duplicate_is_kept_once_the_first() -> None:
    assert reasons([row("a"), row("b"), row("a", " refund\n"), row("a")], TEXT) == [
        None, None, "exact_duplicate", "exact_duplicate",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (row("good", "positive", "Name the sentiment."), row("good", "adjective", "Name the part of speech.")),
        (row("us", "pronoun"), row("US", "country")),
        (row("a b", "x"), row("a  b", "y")),
        (row("ﬁne", "x"), row("fine", "y")),
    ],
)
def test_tasks_told_apart_by_a_letter_or_by_their_system_turn_are_no_conflict(first: Row, second: Row) -> None:
    assert reasons([first, second], LABELS) == [None, None]


def test_labels_that_contradict_each_other_all_leave_and_texts_stay() -> None:
    def rows() -> list[Row]:
        return [row("a", "refund"), row("a", "refund"), row("a", "login"), row("b", "login")]

    assert reasons(rows(), LABELS) == ["conflicting_answer", "exact_duplicate", "conflicting_answer", None]
    assert reasons(rows(), TEXT) == [None, "exact_duplicate", None, None]


def test_what_a_template_renders_alike_is_one_prompt() -> None:
    rows = [row("a", "refund"), row("a ", "login"), row("a ", "refund")]
    for item in rows:
        item.prompt_key = "the same tokens"
    assert reasons(rows, LABELS) == ["conflicting_answer", "conflicting_answer", "exact_duplicate"]


def test_tools_belong_to_the_prompt_and_reasoning_and_calls_to_the_answer() -> None:
    with_tools = row("a")
    with_tools.replace_texts(with_tools.messages, TOOLS)
    call = {"type": "function", "function": {"name": "track", "arguments": {}}}
    rows = [row("a"), with_tools, row("a", reasoning_content="because"), row("a", tool_calls=[call])]
    assert reasons(rows, TEXT) == [None] * 4


def test_bad_rows_are_not_compared() -> None:
    rows = [row("a"), row("a")]
    rows[0].reason = "too_long"
    assert reasons(rows, TEXT) == ["too_long", None]
