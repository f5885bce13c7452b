"""What a row belongs to, and the rules over those slices."""

from __future__ import annotations

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import slices, verdict
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import sliced
from qlora_retrain.evaluation.rules.rule import Rule
from qlora_retrain.evaluation.verdict import Verdict

FIRST = EvaluateConfig(first_release=True, max_loss_to_champion=0.3)


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
    assert slices.script(text) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, "0-31"), (31, "0-31"), (32, "32-63"), (64, "64-127")])
def test_lengths_are_powers_of_two(count: int, expected: str) -> None:
    assert slices.length("x" * count) == expected


def test_a_row_belongs_to_its_label_its_length_and_its_language() -> None:
    messages = [
        {"role": "system", "content": "система " * 20},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "greeting"},
    ]
    assert slices.of(messages, labelled=True) == ("label=greeting", "length=0-31", "language=latin")
    assert slices.of(messages, "de", labelled=False) == ("length=0-31", "language=de")


def scored(right: dict[str, list[bool]]) -> list[RowScore]:
    return [
        RowScore(f"{label}{i}", "eval", 1.0, 2, label if hit else "?", hit, slices=(f"label={label}", "language=latin"))
        for label, hits in right.items()
        for i, hit in enumerate(hits)
    ]


def hits(right: int, rows: int = 30) -> list[bool]:
    return [i < right for i in range(rows)]


def rule(judged: Verdict, name: str) -> Rule:
    return next(r for r in judged.rules if r.name == name)


BASE = scored({"a": hits(3), "b": hits(3), "c": hits(3)})
CHAMPION = scored({"a": hits(28), "b": hits(10), "c": hits(10)})


def test_better_overall_but_broken_on_a_label_is_refused() -> None:
    challenger = scored({"a": hits(8), "b": hits(30), "c": hits(30)})
    judged = verdict.judge({"base": BASE, "champion": CHAMPION, "challenger": challenger}, FIRST)
    assert judged.verdict == "refuse"
    assert [r.name for r in judged.rules if not r.passed] == ["slices"]
    assert "label=a" in rule(judged, "slices").text
    assert rule(judged, "slices").value == pytest.approx(20 / 30)
    unsliced = FIRST.model_copy(update={"max_slice_loss": None})
    assert verdict.judge({"base": BASE, "champion": CHAMPION, "challenger": challenger}, unsliced).verdict == "pass"


def test_a_slice_a_little_worse_is_no_proof() -> None:
    challenger = scored({"a": hits(25), "b": hits(30), "c": hits(30)})
    judged = verdict.judge({"base": BASE, "champion": CHAMPION, "challenger": challenger}, FIRST)
    assert judged.verdict == "pass"
    assert rule(judged, "slices").value == pytest.approx(0.1)


def test_small_slices_are_told_and_decide_nothing_but_where_a_floor_names_them() -> None:
    challenger = scored({"a": hits(30), "b": hits(30), "c": hits(30), "d": [False] * 5})
    base = scored({"a": hits(3), "b": hits(3), "c": hits(3), "d": [True] * 5})
    judged = verdict.judge({"base": base, "challenger": challenger}, FIRST)
    assert judged.verdict == "pass"
    assert "1 slices with fewer than 20 rows were not judged" in rule(judged, "slices").text
    named = FIRST.model_copy(update={"slice_floors": {"label=d": 0.5}})
    judged = verdict.judge({"base": base, "challenger": challenger}, named)
    assert judged.verdict == "insufficient evidence"
    assert "label=d has 5 evaluation rows; at least 20 are needed" in judged.sentence


def test_floors_hold_in_every_slice_and_by_name() -> None:
    challenger = scored({"a": hits(20), "b": hits(30), "c": hits(30)})
    scores = {"base": BASE, "challenger": challenger}
    floor = FIRST.model_copy(update={"slice_floor": 0.7})
    judged = verdict.judge(scores, floor)
    assert judged.verdict == "refuse"
    assert rule(judged, "slice_floor").value == pytest.approx(2 / 3)
    assert verdict.judge(scores, FIRST.model_copy(update={"slice_floor": 0.6})).verdict == "pass"
    named = FIRST.model_copy(update={"slice_floors": {"label=b": 0.9, "label=a": 0.9}})
    assert [r.name for r in verdict.judge(scores, named).rules if not r.passed] == ["slice_floor label=a"]


def test_a_floor_for_slices_needs_a_metric_that_has_one() -> None:
    texts = [RowScore(str(i), "eval", 1.0, 2, slices=("language=latin",)) for i in range(40)]
    worse = [RowScore(str(i), "eval", 3.0, 2, slices=("language=latin",)) for i in range(40)]
    settings = FIRST.model_copy(update={"slice_floor": 0.7})
    judged = verdict.judge({"base": worse, "challenger": texts}, settings)
    assert judged.verdict == "insufficient evidence"
    assert "a loss has no floor" in judged.sentence


def test_where_no_slice_has_enough_rows_the_rule_lacks_evidence() -> None:
    few = FIRST.model_copy(update={"min_slice_rows": 1000})
    judged = verdict.judge({"base": BASE, "challenger": CHAMPION}, few)
    assert judged.verdict == "insufficient evidence"


def test_the_more_slices_are_looked_at_the_surer_each_must_be() -> None:
    challenger = scored({"a": hits(20), "b": hits(30), "c": hits(30)})
    all_three = sliced.measure({"base": BASE, "champion": CHAMPION, "challenger": challenger}, FIRST)
    alone = {name: rows[:30] for name, rows in {"base": BASE, "champion": CHAMPION, "challenger": challenger}.items()}
    one = sliced.measure(alone, FIRST)
    first, second = (next(s.gain for s in found if s.name == "label=a") for found in (all_three, one))
    assert first is not None
    assert second is not None
    assert first.value == second.value
    assert first.high - first.low > second.high - second.low
