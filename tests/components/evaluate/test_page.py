"""What the page counts."""

from __future__ import annotations

from components.evaluate import page
from components.evaluate.found import Found
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import verdict
from qlora_retrain.evaluation.rows import Row
from qlora_retrain.evaluation.scoring import RowScore

ANSWERS = {"0": "a", "1": "a", "2": "b", "3": "b", "4": "c"}
ROWS = [RowScore(i, "eval", 1.0, 1, p, p == ANSWERS[i]) for i, p in zip("01234", "aabac", strict=True)]


def test_labels_stand_with_the_worst_first() -> None:
    assert page.by_label(ROWS, ANSWERS) == [("b", 2, 1), ("a", 2, 2), ("c", 1, 1)]


def test_confusions_are_counted_by_answer_and_prediction_the_most_changed_first() -> None:
    before = [RowScore(i, "eval", 1.0, 1, "b", ANSWERS[i] == "b") for i in "01234"]
    assert page.confusions(ROWS, before, ANSWERS) == [("a", "b", 0, 2), ("b", "a", 1, 0), ("c", "b", 0, 1)]
    assert page.confusions(ROWS, ROWS, ANSWERS) == [("b", "a", 1, 1)]


def test_golden_answers_stand_side_by_side_the_most_changed_first() -> None:
    written = {
        "alike": ("your order is on its way", "your order is on its way"),
        "other": ("your order is on its way", "we give your money back"),
        "near": ("your order is on its way", "your order is late"),
    }
    rows = [
        Row(i, "golden", [{"role": "user", "content": f"asked {i}"}, {"role": "assistant", "content": "wanted"}])
        for i in written
    ]
    found = Found({"eval": {}, "golden": {}, "reference": {}})
    found.scores = {
        name: [RowScore(i, "golden", 1.0, 2) for i in written] for name in ("base", "champion", "challenger")
    }
    found.written = {
        "base": dict.fromkeys(written, "nothing"),
        "champion": {i: before for i, (before, _) in written.items()},
        "challenger": {i: after for i, (_, after) in written.items()},
    }
    found.measured = {"eval": {}, "golden": {}, "reference": {}}
    shown = page.write(verdict.Verdict("pass", "fine", ()), found, EvaluateConfig(), rows)
    assert sorted(written, key=lambda i: shown.index(f"asked {i}")) == ["other", "near", "alike"]
