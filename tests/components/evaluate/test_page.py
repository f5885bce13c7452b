"""What the page counts."""

from __future__ import annotations

from components.evaluate import page
from qlora_retrain.scoring import RowScore

ANSWERS = {"0": "a", "1": "a", "2": "b", "3": "b", "4": "c"}
ROWS = [RowScore(i, "eval", 1.0, 1, p, p == ANSWERS[i]) for i, p in zip("01234", "aabac", strict=True)]


def test_labels_stand_with_the_worst_first() -> None:
    assert page.by_label(ROWS, ANSWERS) == [("b", 2, 1), ("a", 2, 2), ("c", 1, 1)]


def test_confusions_are_counted_by_answer_and_prediction() -> None:
    more = [*ROWS, RowScore("3", "eval", 1.0, 1, "a", False), RowScore("4", "eval", 1.0, 1, "b", False)]
    assert page.confusions(more, ANSWERS) == [("b", "a", 2), ("c", "b", 1)]
