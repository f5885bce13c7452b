"""What the page counts."""

from __future__ import annotations

from components.evaluate import page
from qlora_retrain.scoring import RowScore

ANSWERS = {"0": "a", "1": "a", "2": "b", "3": "b", "4": "c"}
ROWS = [RowScore(i, "eval", 1.0, 1, p, p == ANSWERS[i]) for i, p in zip("01234", "aabac", strict=True)]


def test_labels_stand_with_the_worst_first() -> None:
    assert page.by_label(ROWS, ANSWERS) == [("b", 2, 1), ("a", 2, 2), ("c", 1, 1)]


def test_confusions_are_counted_by_answer_and_prediction_the_most_changed_first() -> None:
    before = [RowScore(i, "eval", 1.0, 1, "b", ANSWERS[i] == "b") for i in "01234"]
    assert page.confusions(ROWS, before, ANSWERS) == [("a", "b", 0, 2), ("b", "a", 1, 0), ("c", "b", 0, 1)]
    assert page.confusions(ROWS, ROWS, ANSWERS) == [("b", "a", 1, 1)]
