"""Training rows that nearly equal a golden, an evaluation or another training row."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from components.validate_data.checks import Row, Split
from components.validate_data.similar_rows import check_similar_rows
from qlora_retrain.config.data import DataConfig

QUESTION = "how long does it take until my new card is delivered to me"
SIMILAR = "how long does it take until the new card is delivered to me?"
UNRELATED = "why was I charged twice for the same purchase at the store"


def row(prompt: str, answer: str = "delivery", split: Split | None = "train") -> Row:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Row("a.jsonl", 1, turns, "0", split=split)


def check(rows: Sequence[Row], golden: Sequence[Row] = (), **settings: object) -> list[str | None]:
    check_similar_rows(rows, golden, DataConfig(**settings))
    return [row.reason for row in rows]


def test_a_training_row_like_an_evaluation_row_is_not_trained_on() -> None:
    rows = [row(SIMILAR), row(UNRELATED), row(QUESTION, split="eval")]
    assert check(rows) == ["near_evaluation", None, None]
    assert [r.split for r in rows] == [None, "train", "eval"]
    # Also one that max_eval_rows leaves out: a higher limit brings it back.
    assert check([row(SIMILAR), row(QUESTION, split="dropped")]) == ["near_evaluation", None]


def test_a_training_row_like_a_golden_row_is_not_trained_on_whatever_its_answer() -> None:
    assert check([row(SIMILAR, "another label"), row(UNRELATED)], [row(QUESTION)]) == ["near_evaluation", None]


def test_the_check_warns_refuses_or_is_off() -> None:
    for severity, reason, hits in (
        ("warn", None, ("near_evaluation",)),
        ("refuse", "near_evaluation", ("near_evaluation",)),
        ("off", None, ()),
    ):
        rows = [row(SIMILAR), row(QUESTION, split="eval")]
        assert check(rows, checks={"near_evaluation": severity}) == [reason, None]
        assert rows[0].hits == hits


def test_near_duplicates_within_training_are_noted_and_dropped_where_the_line_says_so() -> None:
    rows = [row(QUESTION), row(UNRELATED), row(SIMILAR)]
    assert check(rows) == [None, None, None]
    assert [r.hits for r in rows] == [(), (), ("near_duplicates",)]
    # Which of them stays does not depend on their order.
    for texts in ((QUESTION, SIMILAR), (SIMILAR, QUESTION)):
        rows = [row(text) for text in texts]
        assert set(check(rows, checks={"near_duplicates": "drop"})) == {None, "near_duplicates"}
        assert next(r for r in rows if r.split).messages[0]["content"] == SIMILAR


def test_two_answers_to_one_question_are_two_examples() -> None:
    rows = [row(QUESTION, "In five days."), row(SIMILAR, "Please look into the app, where the date is shown.")]
    assert check(rows, checks={"near_duplicates": "drop"}) == [None, None]
    labels = [row(QUESTION, "delivery"), row(SIMILAR, "arrival")]
    assert check(labels, task="labels", checks={"near_duplicates": "drop"}) == [None, None]


def test_the_threshold_decides() -> None:
    rows = [row(SIMILAR), row(QUESTION, split="eval")]
    assert check(rows, near_evaluation_threshold=1.0) == [None, None]


def test_rows_without_a_user_are_compared_by_all_of_their_text() -> None:
    texts = [
        Row("a", 1, [{"role": "assistant", "content": text}], "0", split="train") for text in (QUESTION, UNRELATED)
    ]
    evaluation = Row("a", 3, [{"role": "assistant", "content": SIMILAR}], "0", split="eval")
    assert check([*texts, evaluation]) == ["near_evaluation", None, None]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_the_rows_does_not_decide_what_the_walls_keep_out(reverse: bool) -> None:
    rows = [row(f"{SIMILAR} number {i}") for i in range(5)] + [row(f"{SIMILAR} number 7", split="eval"), row(UNRELATED)]
    rows = rows[::-1] if reverse else rows
    check(rows)
    assert [r.messages[0]["content"] for r in rows if r.split == "train"] == [UNRELATED]


@pytest.mark.parametrize(
    "copy",
    [
        f"Hi there! {QUESTION} Thanks in advance, kind regards",
        f"Dear support team, {' '.join(reversed(QUESTION.split()))} please",
        QUESTION.replace("o", "о").replace("e", "е"),  # Cyrillic letters that look alike
        QUESTION.upper().replace("E", "É"),
    ],
)
def test_politeness_and_letters_that_look_alike_make_no_other_question(copy: str) -> None:
    assert check([row(copy), row(UNRELATED), row(QUESTION, split="eval")]) == ["near_evaluation", None, None]


def test_a_greeting_alone_is_like_no_other_row() -> None:
    assert check([row("hello dear team"), row(f"Hello {QUESTION}", split="eval")]) == [None, None]
