"""Check which slices a row belongs to, and the rules over slices."""

from __future__ import annotations

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import slices
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import slice_rules
from qlora_retrain.evaluation.rules.rule_result import RuleResult
from qlora_retrain.evaluation.verdict import Verdict, apply_rules

FIRST = EvaluateConfig(allow_first_release=True, max_loss_to_champion=0.3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is my parcel?", "latin"),
        ("Wo ist mein Päckchen?", "latin"),
        ("Где моя посылка?", "cyrillic"),
        ("荷物はどこですか", "hiragana"),
        ("أين طردي؟", "arabic"),
        ("12 + 3 = ?", "none"),
        ("ok, но где она?", "cyrillic"),
    ],
)
def test_the_script_is_that_of_most_letters(text: str, expected: str) -> None:
    assert slices.dominant_script(text) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, "0-31"), (31, "0-31"), (32, "32-63"), (64, "64-127")])
def test_lengths_are_powers_of_two(count: int, expected: str) -> None:
    assert slices.length_range("x" * count) == expected


def test_a_row_belongs_to_its_label_its_length_and_its_language() -> None:
    messages = [
        {"role": "system", "content": "система " * 20},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "greeting"},
    ]
    assert slices.slice_names(messages, has_labels=True) == ("label=greeting", "length=0-31", "language=latin")
    assert slices.slice_names(messages, "de", has_labels=False) == ("length=0-31", "language=de")


def score_labels(right: dict[str, list[bool]]) -> list[RowScore]:
    return [
        RowScore(f"{label}{i}", "eval", 1.0, 2, label if hit else "?", hit, slices=(f"label={label}", "language=latin"))
        for label, is_right in right.items()
        for i, hit in enumerate(is_right)
    ]


def first_right(right: int, rows: int = 30) -> list[bool]:
    return [i < right for i in range(rows)]


def find_rule(verdict: Verdict, name: str) -> RuleResult:
    return next(r for r in verdict.rules if r.name == name)


BASE = score_labels({"a": first_right(3), "b": first_right(3), "c": first_right(3)})
CHAMPION = score_labels({"a": first_right(28), "b": first_right(10), "c": first_right(10)})


def test_better_overall_but_broken_on_a_label_is_refused() -> None:
    challenger = score_labels({"a": first_right(8), "b": first_right(30), "c": first_right(30)})
    verdict = apply_rules({"base": BASE, "champion": CHAMPION, "challenger": challenger}, FIRST)
    assert verdict.decision == "refuse"
    assert [r.name for r in verdict.rules if not r.passed] == ["slices"]
    assert "label=a" in find_rule(verdict, "slices").text
    assert find_rule(verdict, "slices").value == pytest.approx(20 / 30)

    # Overall the challenger is better, so without the rule it would pass.
    without_slices = FIRST.model_copy(update={"max_slice_regression": None})
    assert (
        apply_rules({"base": BASE, "champion": CHAMPION, "challenger": challenger}, without_slices).decision == "pass"
    )


def test_a_slice_that_is_a_little_worse_does_not_refuse() -> None:
    # 25 of 30 against 28 of 30: the loss of 0.1 is not above the limit, and not certain.
    challenger = score_labels({"a": first_right(25), "b": first_right(30), "c": first_right(30)})
    verdict = apply_rules({"base": BASE, "champion": CHAMPION, "challenger": challenger}, FIRST)
    assert verdict.decision == "pass"
    assert find_rule(verdict, "slices").value == pytest.approx(0.1)


def test_small_slices_are_counted_and_decide_only_where_a_floor_names_them() -> None:
    challenger = score_labels({"a": first_right(30), "b": first_right(30), "c": first_right(30), "d": [False] * 5})
    base = score_labels({"a": first_right(3), "b": first_right(3), "c": first_right(3), "d": [True] * 5})
    verdict = apply_rules({"base": base, "challenger": challenger}, FIRST)
    assert verdict.decision == "pass"
    assert "1 slices with fewer than 20 different prompts were not compared" in find_rule(verdict, "slices").text

    named = FIRST.model_copy(update={"slice_floors": {"label=d": 0.5}})
    verdict = apply_rules({"base": base, "challenger": challenger}, named)
    assert verdict.decision == "insufficient evidence"
    assert "label=d has evaluation rows of 5 different prompts; at least 20 are needed" in verdict.sentence


def test_floors_hold_in_every_slice_and_by_name() -> None:
    challenger = score_labels({"a": first_right(20), "b": first_right(30), "c": first_right(30)})
    scores = {"base": BASE, "challenger": challenger}
    floor = FIRST.model_copy(update={"slice_floor": 0.7})
    verdict = apply_rules(scores, floor)
    assert verdict.decision == "refuse"
    assert find_rule(verdict, "slice_floor").value == pytest.approx(2 / 3)
    assert apply_rules(scores, FIRST.model_copy(update={"slice_floor": 0.6})).decision == "pass"

    named = FIRST.model_copy(update={"slice_floors": {"label=b": 0.9, "label=a": 0.9}})
    assert [r.name for r in apply_rules(scores, named).rules if not r.passed] == ["slice_floor label=a"]


def test_a_floor_for_slices_needs_a_metric_that_can_have_a_floor() -> None:
    better = [RowScore(str(i), "eval", 1.0, 2, slices=("language=latin",)) for i in range(40)]
    worse = [RowScore(str(i), "eval", 3.0, 2, slices=("language=latin",)) for i in range(40)]
    settings = FIRST.model_copy(update={"slice_floor": 0.7})
    verdict = apply_rules({"base": worse, "challenger": better}, settings)
    assert verdict.decision == "insufficient evidence"
    assert "a loss has no floor" in verdict.sentence


def test_where_no_slice_has_enough_rows_the_rule_lacks_evidence() -> None:
    few = FIRST.model_copy(update={"min_slice_prompts": 1000})
    verdict = apply_rules({"base": BASE, "challenger": CHAMPION}, few)
    assert verdict.decision == "insufficient evidence"


def test_the_more_slices_are_compared_the_more_certain_each_must_be() -> None:
    challenger = score_labels({"a": first_right(20), "b": first_right(30), "c": first_right(30)})
    three_slices = slice_rules.compare_slices({"base": BASE, "champion": CHAMPION, "challenger": challenger}, FIRST)
    # The first 30 rows are all of label a.
    alone = {name: rows[:30] for name, rows in {"base": BASE, "champion": CHAMPION, "challenger": challenger}.items()}
    one_slice = slice_rules.compare_slices(alone, FIRST)

    # With three slices each interval has a third of the error probability, so it is wider.
    of_three, of_one = (next(s.gain for s in results if s.name == "label=a") for results in (three_slices, one_slice))
    assert of_three is not None
    assert of_one is not None
    assert of_three.value == of_one.value
    assert of_three.high - of_three.low > of_one.high - of_one.low
