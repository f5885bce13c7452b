"""Check the counts and the order in the report."""

from __future__ import annotations

from components.evaluate import report
from components.evaluate.result import EvaluationResult
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import Row
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.evaluation.verdict import Verdict

ANSWERS = {"0": "a", "1": "a", "2": "b", "3": "b", "4": "c"}
ROWS = [RowScore(i, "eval", 1.0, 1, p, p == ANSWERS[i]) for i, p in zip("01234", "aabac", strict=True)]


def test_labels_are_listed_with_the_worst_first() -> None:
    assert report.accuracy_by_label(ROWS, ANSWERS) == [("b", 2, 1), ("a", 2, 2), ("c", 1, 1)]


def test_confusions_are_counted_by_answer_and_prediction_the_most_changed_first() -> None:
    theirs = [RowScore(i, "eval", 1.0, 1, "b", ANSWERS[i] == "b") for i in "01234"]
    assert report.count_confusions(ROWS, theirs, ANSWERS) == [("a", "b", 0, 2), ("b", "a", 1, 0), ("c", "b", 0, 1)]
    assert report.count_confusions(ROWS, ROWS, ANSWERS) == [("b", "a", 1, 1)]


def test_golden_completions_are_listed_with_the_most_changed_first() -> None:
    completions = {
        "alike": ("your order is on its way", "your order is on its way"),
        "different": ("your order is on its way", "we give your money back"),
        "near": ("your order is on its way", "your order is late"),
    }
    rows = [
        Row(i, "golden", [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}])
        for i in completions
    ]

    # The rows are in another order than the report must have.
    result = EvaluationResult({"eval": {}, "golden": {}, "reference": {}})
    result.scores = {
        name: [RowScore(i, "golden", 1.0, 2) for i in completions] for name in ("base", "champion", "challenger")
    }
    result.completions = {
        "base": dict.fromkeys(completions, "nothing"),
        "champion": {i: before for i, (before, _) in completions.items()},
        "challenger": {i: after for i, (_, after) in completions.items()},
    }
    result.metrics = {"eval": {}, "golden": {}, "reference": {}}

    page = report.render(Verdict("pass", "fine", ()), result, EvaluateConfig(), rows)
    assert sorted(completions, key=lambda i: page.index(f"question {i}")) == ["different", "near", "alike"]
