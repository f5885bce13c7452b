"""The rules on made-up scores whose outcome can be told by eye."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core.errors import Exit
from qlora_retrain.evaluation import verdict
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.evaluation.verdict import Rule, Verdict

FIRST = EvaluateConfig(first_release=True)


def labelled(right: Sequence[bool], suite: str = "eval") -> list[RowScore]:
    return [
        RowScore(f"{suite}{i}", suite, 0.2 if hit else 3.0, 2, "a" if hit else "b", hit) for i, hit in enumerate(right)
    ]


def texts(losses: Sequence[float], suite: str = "eval", tokens: int = 10) -> list[RowScore]:
    return [RowScore(f"{suite}{i}", suite, loss * tokens, tokens) for i, loss in enumerate(losses)]


def share(hits: int, rows: int = 100) -> list[bool]:
    """So many right answers, spread over the rows."""
    return [(i * 37) % rows < hits for i in range(rows)]


def rule(judged: Verdict, name: str) -> Rule:
    return next(r for r in judged.rules if r.name == name)


def test_a_first_release_that_beats_the_base_passes() -> None:
    judged = verdict.judge({"base": labelled(share(30)), "challenger": labelled(share(90))}, FIRST)
    assert judged.verdict == "pass"
    gain = rule(judged, "gain_over_base")
    assert gain.value == pytest.approx(0.6)
    assert gain.low is not None
    assert 0.4 < gain.low < 0.6
    report = judged.report({"rows": 100})
    assert report.refused is None
    assert report.numbers == {"verdict": "pass", "rows": 100}


def test_without_a_champion_a_release_that_is_not_the_first_lacks_evidence() -> None:
    judged = verdict.judge({"base": labelled(share(30)), "challenger": labelled(share(90))}, EvaluateConfig())
    assert judged.verdict == "insufficient evidence"
    assert "set evaluate.first_release: true to allow the first version" in judged.sentence
    refused = judged.report({}).refused
    assert refused is not None
    assert refused.exit_code == Exit.QUALITY_REFUSED


def test_a_challenger_no_better_than_the_base_is_refused() -> None:
    judged = verdict.judge({"base": labelled(share(80)), "challenger": labelled(share(80))}, FIRST)
    assert judged.verdict == "refuse"
    assert rule(judged, "gain_over_base").passed is False


def test_a_gain_must_be_certain_and_not_only_measured() -> None:
    base, challenger = share(50), [*share(50)[:-1], True]
    assert sum(challenger) == sum(base) + 1
    judged = verdict.judge({"base": labelled(base), "challenger": labelled(challenger)}, FIRST)
    assert judged.verdict == "refuse"


def test_a_champion_that_may_be_better_by_more_than_the_limit_refuses() -> None:
    scores = {
        "base": labelled(share(10)),
        "champion": labelled(share(95)),
        "challenger": labelled(share(90)),
    }
    judged = verdict.judge(scores, EvaluateConfig(max_loss_to_champion=0.02))
    assert judged.verdict == "refuse"
    found = rule(judged, "loss_to_champion")
    assert found.value == pytest.approx(0.05)
    assert found.high is not None
    assert found.high > 0.02
    assert verdict.judge(scores, EvaluateConfig(max_loss_to_champion=0.15)).verdict == "pass"


def test_a_champion_is_compared_with_even_where_a_first_release_is_allowed() -> None:
    scores = {"base": labelled(share(10)), "champion": labelled(share(95)), "challenger": labelled(share(50))}
    assert verdict.judge(scores, FIRST).verdict == "refuse"


@pytest.mark.parametrize("rows", [0, 29])
def test_too_few_rows_are_insufficient_evidence_whatever_they_say(rows: int) -> None:
    scores = {"base": labelled([True] * rows), "challenger": labelled([False] * rows)}
    judged = verdict.judge(scores, FIRST)
    assert judged.verdict == "insufficient evidence"
    assert f"{rows} evaluation rows; at least 30 are needed" in judged.sentence


def test_a_floor_under_the_accuracy_refuses() -> None:
    scores = {"base": labelled(share(10)), "challenger": labelled(share(80))}
    assert verdict.judge(scores, EvaluateConfig(first_release=True, min_accuracy=0.8)).verdict == "pass"
    judged = verdict.judge(scores, EvaluateConfig(first_release=True, min_accuracy=0.81))
    assert judged.verdict == "refuse"
    assert rule(judged, "accuracy_floor").value == pytest.approx(0.8)


def test_a_floor_for_a_task_without_accuracy_lacks_evidence() -> None:
    scores = {"base": texts([2.0] * 40), "challenger": texts([1.0] * 40)}
    judged = verdict.judge(scores, EvaluateConfig(first_release=True, min_accuracy=0.5))
    assert judged.verdict == "insufficient evidence"


def test_a_text_task_is_judged_by_loss_a_token_and_lower_is_better() -> None:
    better, worse = [1.0 + i % 3 / 10 for i in range(40)], [2.0 + i % 5 / 10 for i in range(40)]
    judged = verdict.judge({"base": texts(worse), "challenger": texts(better)}, FIRST)
    assert judged.verdict == "pass"
    assert rule(judged, "gain_over_base").value == pytest.approx(sum(worse) / 40 - sum(better) / 40)
    assert verdict.judge({"base": texts(better), "challenger": texts(worse)}, FIRST).verdict == "refuse"


def test_a_rival_with_another_tokenizer_is_compared_per_token_of_the_challenger() -> None:
    same_nats = [RowScore(s.id, s.suite, s.loss_nats, s.tokens * 3) for s in texts([1.0] * 40)]
    scores = {"base": texts([3.0] * 40), "champion": same_nats, "challenger": texts([1.0] * 40)}
    assert rule(verdict.judge(scores, EvaluateConfig()), "loss_to_champion").value == pytest.approx(0.0)


@pytest.mark.parametrize("contestant", ["base", "challenger"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_refuses(contestant: str, bad: float) -> None:
    scores = {"base": texts([2.0] * 40), "challenger": texts([1.0] * 40)}
    scores[contestant][7] = RowScore("eval7", "eval", bad, 10)
    judged = verdict.judge(scores, FIRST)
    assert judged.verdict == "refuse"
    assert "not finite" in judged.sentence
    json.dumps(judged.rules_as_json(), allow_nan=False)


def test_golden_rows_refuse_a_challenger_that_is_surely_worse_on_them() -> None:
    scores = {
        "base": labelled(share(10)) + labelled([True] * 20, "golden"),
        "challenger": labelled(share(90)) + labelled([False] * 12 + [True] * 8, "golden"),
    }
    judged = verdict.judge(scores, FIRST)
    assert judged.verdict == "refuse"
    assert rule(judged, "golden").value == pytest.approx(0.6)


def test_few_golden_rows_are_insufficient_evidence_until_the_line_says_how_few_will_do() -> None:
    scores = {
        "base": labelled(share(10)) + labelled([True] * 9, "golden"),
        "challenger": labelled(share(90)) + labelled([True] * 9, "golden"),
    }
    judged = verdict.judge(scores, FIRST)
    assert judged.verdict == "insufficient evidence"
    assert "9 golden rows; at least 10 are needed (evaluate.min_golden_rows)" in judged.sentence
    assert verdict.judge(scores, FIRST.model_copy(update={"min_golden_rows": 9})).verdict == "pass"


def test_forgetting_more_than_allowed_refuses_and_no_reference_text_lacks_evidence() -> None:
    settings = EvaluateConfig(first_release=True, max_forgetting_nats=0.1)
    base, challenger = labelled(share(10)), labelled(share(90))
    reference = texts([2.0, 2.1, 1.9] * 6, "reference")
    kept, lost = texts([2.05, 2.15, 1.9] * 6, "reference"), texts([2.3, 2.4, 2.1] * 6, "reference")
    assert verdict.judge({"base": base + reference, "challenger": challenger + kept}, settings).verdict == "pass"
    judged = verdict.judge({"base": base + reference, "challenger": challenger + lost}, settings)
    assert judged.verdict == "refuse"
    assert rule(judged, "forgetting").value == pytest.approx(0.8 / 3)
    for few in (0, 1, 15):
        judged = verdict.judge({"base": base + reference[:few], "challenger": challenger + reference[:few]}, settings)
        assert judged.verdict == "insufficient evidence", "the same text kept as well as can be, but too little of it"
        assert f"there are {few} passages of reference text and at least 16 are needed" in judged.sentence


def passages(hits: Sequence[int], tokens: Sequence[int]) -> list[RowScore]:
    return [
        RowScore(f"reference{i}", "reference", 2.0 * t, t, hits=h)
        for i, (h, t) in enumerate(zip(hits, tokens, strict=True))
    ]


def test_forgetting_in_right_tokens_is_refused_and_is_never_surer_than_the_tokens_are_many() -> None:
    base, challenger = labelled(share(10)), labelled(share(90))

    def judged(hits: int, limit: float, tokens: int = 50) -> verdict.Verdict:
        settings = EvaluateConfig(first_release=True, max_forgetting_accuracy=limit)
        ours, theirs = passages([hits] * 18, [tokens] * 18), passages([tokens // 2] * 18, [tokens] * 18)
        return verdict.judge({"base": base + theirs, "challenger": challenger + ours}, settings)

    assert judged(20, 0.02).verdict == "refuse"
    assert rule(judged(20, 0.02), "forgetting_accuracy").value == pytest.approx(0.1)
    assert judged(25, 0.02).verdict == "pass"
    # Every passage alike: what so many tokens cannot rule out is not ruled out.
    assert judged(25, 0.0005).verdict == "refuse"
    assert judged(1, 0.02, tokens=3).verdict == "refuse"


def test_passages_in_which_nothing_is_judged_are_no_evidence() -> None:
    settings = EvaluateConfig(first_release=True, max_forgetting_nats=0.1)
    for told in (0, 15):
        reference = passages([0] * 40, [9] * told + [0] * (40 - told))
        scores = {"base": labelled(share(10)) + reference, "challenger": labelled(share(90)) + reference}
        judged = verdict.judge(scores, settings)
        assert judged.verdict == "insufficient evidence"
        assert f"there are {told} passages of reference text" in judged.sentence


def valid(right: Sequence[bool | None], suite: str = "eval") -> list[RowScore]:
    """Rows whose JSON is valid or not; None where nothing of the kind was asked for."""
    return [
        RowScore(f"{suite}{i}", suite, 1.0, 2, values={} if hit is None else {"json_validity": float(hit)})
        for i, hit in enumerate(right)
    ]


def test_rows_of_which_the_primary_metric_says_nothing_are_no_evidence() -> None:
    settings = EvaluateConfig(first_release=True, metrics=["json_validity"], primary="json_validity")
    nothing: list[bool | None] = [None] * 40
    judged = verdict.judge({"base": valid([False] * 5 + nothing), "challenger": valid([True] * 5 + nothing)}, settings)
    assert judged.verdict == "insufficient evidence"
    assert "says something of 5 evaluation rows; at least 30 are needed" in judged.sentence
    base, challenger = valid([False] * 30 + nothing), valid([True] * 30 + nothing)
    assert verdict.judge({"base": base, "challenger": challenger}, settings).verdict == "pass"
    golden = valid([None] * 12, "golden")
    judged = verdict.judge({"base": base + golden, "challenger": challenger + golden}, settings)
    assert judged.verdict == "insufficient evidence"
    assert "0 golden rows beside 12 of which" in judged.sentence


def test_merging_that_costs_more_than_allowed_fails_its_rule() -> None:
    live, merged = texts([1.0 + i / 100 for i in range(40)]), texts([1.03 + i / 100 for i in range(40)])
    assert verdict.merge_cost(live, merged, 0.05, FIRST).passed is True
    cost = verdict.merge_cost(live, merged, 0.02, FIRST)
    assert cost.passed is False
    assert cost.value == pytest.approx(0.03)
    scores = {"base": texts([3.0] * 40), "challenger": merged}
    assert verdict.judge(scores, FIRST, extra=[cost]).verdict == "refuse"


def test_contestants_with_different_rows_are_our_bug() -> None:
    with pytest.raises(ValueError, match="different eval rows"):
        verdict.judge({"base": texts([1.0] * 40), "challenger": texts([1.0] * 41)}, FIRST)


def test_measures_hold_loss_perplexity_accuracy_and_macro_f1() -> None:
    rows = labelled([True, True, True, False])
    answers = {"eval0": "a", "eval1": "a", "eval2": "a", "eval3": "c"}
    found = verdict.measure(rows, FIRST, answers)
    assert found["loss"] == pytest.approx(3.6 / 8)
    assert found["perplexity"] == pytest.approx(math.exp(3.6 / 8))
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx(1 / 3)  # a: 1, c: 0, and b, which was predicted once: 0
    assert found["rows"] == 4
    assert verdict.measure([], FIRST, {}) == {}
    for metric in ("loss", "perplexity", "accuracy", "macro_f1"):
        assert found[f"{metric}_low"] <= found[metric] < found[f"{metric}_high"], metric
    assert found["perplexity_high"] == pytest.approx(math.exp(found["loss_high"]))


def test_a_floor_under_macro_f1_says_how_sure_the_value_is() -> None:
    def said(right: int) -> list[RowScore]:
        return [
            RowScore(str(i), "eval", 1.0, 2, "ab"[(i + (not hit)) % 2], hit, slices=(f"label={'ab'[i % 2]}",))
            for i, hit in enumerate(share(right))
        ]

    judged = verdict.judge(
        {"base": said(10), "challenger": said(80)}, FIRST.model_copy(update={"floors": {"macro_f1": 0.7}})
    )
    found = rule(judged, "macro_f1_floor")
    assert found.passed
    assert (found.low, found.value, found.high) == pytest.approx((0.72, 0.8, 0.87), abs=0.02)
