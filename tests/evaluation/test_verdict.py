"""Check the rules on made-up scores whose outcome can be seen by eye."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core.errors import Exit
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.evaluation.verdict import RuleResult, Verdict, apply_rules, compute_metrics, merge_cost

FIRST = EvaluateConfig(allow_first_release=True)


def label_scores(right: Sequence[bool], suite: str = "eval") -> list[RowScore]:
    return [
        RowScore(f"{suite}{i}", suite, 0.2 if hit else 3.0, 2, "a" if hit else "b", hit) for i, hit in enumerate(right)
    ]


def text_scores(losses: Sequence[float], suite: str = "eval", tokens: int = 10) -> list[RowScore]:
    return [RowScore(f"{suite}{i}", suite, loss * tokens, tokens) for i, loss in enumerate(losses)]


def right_answers(hits: int, rows: int = 100) -> list[bool]:
    """Spread `hits` right answers over the rows."""
    return [(i * 37) % rows < hits for i in range(rows)]


def find_rule(verdict: Verdict, name: str) -> RuleResult:
    return next(r for r in verdict.rules if r.name == name)


def test_a_first_release_that_beats_the_base_passes() -> None:
    verdict = apply_rules(
        {"base": label_scores(right_answers(30)), "challenger": label_scores(right_answers(90))}, FIRST
    )
    assert verdict.decision == "pass"
    gain = find_rule(verdict, "gain_over_base")
    assert gain.value == pytest.approx(0.6)
    assert gain.low is not None
    assert 0.4 < gain.low < 0.6

    report = verdict.to_step_result({"rows": 100})
    assert report.refused is None
    assert report.numbers == {"verdict": "pass", "rows": 100}


def test_without_a_champion_a_release_that_is_not_the_first_lacks_evidence() -> None:
    verdict = apply_rules(
        {"base": label_scores(right_answers(30)), "challenger": label_scores(right_answers(90))}, EvaluateConfig()
    )
    assert verdict.decision == "insufficient evidence"
    assert "set evaluate.allow_first_release: true to allow the first version" in verdict.sentence
    refused = verdict.to_step_result({}).refused
    assert refused is not None
    assert refused.exit_code == Exit.QUALITY_REFUSED


def test_a_challenger_no_better_than_the_base_is_refused() -> None:
    verdict = apply_rules(
        {"base": label_scores(right_answers(80)), "challenger": label_scores(right_answers(80))}, FIRST
    )
    assert verdict.decision == "refuse"
    assert find_rule(verdict, "gain_over_base").passed is False


def test_a_gain_must_be_certain_and_not_only_measured() -> None:
    # One right answer more of 100 is a measured gain, and may well be chance.
    base, challenger = right_answers(50), [*right_answers(50)[:-1], True]
    assert sum(challenger) == sum(base) + 1
    verdict = apply_rules({"base": label_scores(base), "challenger": label_scores(challenger)}, FIRST)
    assert verdict.decision == "refuse"


def partly_scored(rows: Sequence[RowScore], count: int) -> list[RowScore]:
    """Return scores of which all but the first `count` are places of rows that were not scored."""
    return [row if i < count else RowScore(row.id, row.suite, 0.0, 0) for i, row in enumerate(rows)]


def test_a_base_that_was_scored_on_some_rows_is_compared_on_these() -> None:
    base, challenger = label_scores(right_answers(30)), label_scores(right_answers(90))
    partly = {"base": partly_scored(base, 50), "challenger": challenger}
    gain = find_rule(apply_rules(partly, FIRST), "gain_over_base")
    alone = find_rule(apply_rules({"base": base[:50], "challenger": challenger[:50]}, FIRST), "gain_over_base")
    assert (gain.value, gain.low, gain.high) == (alone.value, alone.low, alone.high)
    assert gain.passed

    # Fewer than the line asks for are no evidence.
    verdict = apply_rules({"base": partly_scored(base, 29), "challenger": challenger}, FIRST)
    assert verdict.decision == "insufficient evidence"
    assert "rows of 29 different prompts can be compared with the base" in verdict.sentence


def test_metrics_count_the_rows_that_were_scored() -> None:
    rows = label_scores(right_answers(30))
    answers = {row.id: "a" for row in rows}
    metrics = compute_metrics(partly_scored(rows, 50), FIRST, answers)
    assert metrics == compute_metrics(rows[:50], FIRST, answers)
    assert metrics["rows"] == 50


def test_a_base_on_fewer_rows_than_a_rule_needs_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="base_rows: 20 are fewer than min_prompts: 30"):
        EvaluateConfig(base_rows=20)


def test_a_champion_that_may_be_better_by_more_than_the_limit_refuses() -> None:
    scores = {
        "base": label_scores(right_answers(10)),
        "champion": label_scores(right_answers(95)),
        "challenger": label_scores(right_answers(90)),
    }
    verdict = apply_rules(scores, EvaluateConfig(max_loss_to_champion=0.02))
    assert verdict.decision == "refuse"
    loss = find_rule(verdict, "loss_to_champion")
    assert loss.value == pytest.approx(0.05)
    assert loss.high is not None
    assert loss.high > 0.02

    assert apply_rules(scores, EvaluateConfig(max_loss_to_champion=0.15)).decision == "pass"


def test_a_champion_is_compared_with_even_where_a_first_release_is_allowed() -> None:
    scores = {
        "base": label_scores(right_answers(10)),
        "champion": label_scores(right_answers(95)),
        "challenger": label_scores(right_answers(50)),
    }
    assert apply_rules(scores, FIRST).decision == "refuse"


@pytest.mark.parametrize("rows", [0, 29])
def test_too_few_rows_are_insufficient_evidence_whatever_they_say(rows: int) -> None:
    # The challenger has every row wrong, and still nothing is decided.
    scores = {"base": label_scores([True] * rows), "challenger": label_scores([False] * rows)}
    verdict = apply_rules(scores, FIRST)
    assert verdict.decision == "insufficient evidence"
    text = f"{rows} evaluation rows of {rows} different prompts; at least 30 different prompts are needed"
    assert text in verdict.sentence


def test_a_floor_under_the_accuracy_refuses() -> None:
    scores = {"base": label_scores(right_answers(10)), "challenger": label_scores(right_answers(80))}
    assert apply_rules(scores, EvaluateConfig(allow_first_release=True, min_accuracy=0.8)).decision == "pass"
    verdict = apply_rules(scores, EvaluateConfig(allow_first_release=True, min_accuracy=0.81))
    assert verdict.decision == "refuse"
    assert find_rule(verdict, "accuracy_floor").value == pytest.approx(0.8)


def test_a_floor_for_a_task_without_accuracy_lacks_evidence() -> None:
    scores = {"base": text_scores([2.0] * 40), "challenger": text_scores([1.0] * 40)}
    verdict = apply_rules(scores, EvaluateConfig(allow_first_release=True, min_accuracy=0.5))
    assert verdict.decision == "insufficient evidence"


def test_a_text_task_is_compared_by_loss_per_token_and_lower_is_better() -> None:
    better, worse = [1.0 + i % 3 / 10 for i in range(40)], [2.0 + i % 5 / 10 for i in range(40)]
    verdict = apply_rules({"base": text_scores(worse), "challenger": text_scores(better)}, FIRST)
    assert verdict.decision == "pass"
    assert find_rule(verdict, "gain_over_base").value == pytest.approx(sum(worse) / 40 - sum(better) / 40)
    assert apply_rules({"base": text_scores(better), "challenger": text_scores(worse)}, FIRST).decision == "refuse"


def test_a_rival_with_another_tokenizer_is_compared_per_token_of_the_challenger() -> None:
    # A tokenizer with three tokens for one: the loss per own token would be a third.
    same_nats = [RowScore(s.id, s.suite, s.loss_nats, s.tokens * 3) for s in text_scores([1.0] * 40)]
    scores = {"base": text_scores([3.0] * 40), "champion": same_nats, "challenger": text_scores([1.0] * 40)}
    assert find_rule(apply_rules(scores, EvaluateConfig()), "loss_to_champion").value == pytest.approx(0.0)


@pytest.mark.parametrize("contestant", ["base", "challenger"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_refuses(contestant: str, bad: float) -> None:
    scores = {"base": text_scores([2.0] * 40), "challenger": text_scores([1.0] * 40)}
    scores[contestant][7] = RowScore("eval7", "eval", bad, 10)
    verdict = apply_rules(scores, FIRST)
    assert verdict.decision == "refuse"
    assert "not finite" in verdict.sentence
    # The document of a refusal must be JSON too, which has no NaN.
    json.dumps(verdict.rules_as_json(), allow_nan=False)


def test_golden_rows_refuse_a_challenger_that_is_certainly_worse_on_them() -> None:
    scores = {
        "base": label_scores(right_answers(10)) + label_scores([True] * 20, "golden"),
        "challenger": label_scores(right_answers(90)) + label_scores([False] * 12 + [True] * 8, "golden"),
    }
    verdict = apply_rules(scores, FIRST)
    assert verdict.decision == "refuse"
    assert find_rule(verdict, "golden").value == pytest.approx(0.6)


def test_few_golden_rows_are_insufficient_evidence_unless_the_line_lowers_the_minimum() -> None:
    scores = {
        "base": label_scores(right_answers(10)) + label_scores([True] * 9, "golden"),
        "challenger": label_scores(right_answers(90)) + label_scores([True] * 9, "golden"),
    }
    verdict = apply_rules(scores, FIRST)
    assert verdict.decision == "insufficient evidence"
    assert "9 golden rows of 9 different prompts; at least 10 different prompts are needed" in verdict.sentence
    assert apply_rules(scores, FIRST.model_copy(update={"min_golden_prompts": 9})).decision == "pass"


def test_forgetting_more_than_allowed_refuses_and_no_reference_text_lacks_evidence() -> None:
    settings = EvaluateConfig(allow_first_release=True, max_forgetting_nats=0.1)
    base, challenger = label_scores(right_answers(10)), label_scores(right_answers(90))
    reference = text_scores([2.0, 2.1, 1.9] * 6, "reference")
    remembered = text_scores([2.05, 2.15, 1.9] * 6, "reference")
    forgotten = text_scores([2.3, 2.4, 2.1] * 6, "reference")

    assert apply_rules({"base": base + reference, "challenger": challenger + remembered}, settings).decision == "pass"
    verdict = apply_rules({"base": base + reference, "challenger": challenger + forgotten}, settings)
    assert verdict.decision == "refuse"
    assert find_rule(verdict, "forgetting").value == pytest.approx(0.8 / 3)

    # Nothing at all is forgotten, but there is too little text to show it.
    for few in (0, 1, 15):
        verdict = apply_rules({"base": base + reference[:few], "challenger": challenger + reference[:few]}, settings)
        assert verdict.decision == "insufficient evidence"
        text = f"there are {few} passages of reference text (chats with one prompt count once) and at least 16 are"
        assert text in verdict.sentence


def test_what_the_unmerged_model_forgot_is_reported_and_judged_on_the_form_that_ships() -> None:
    settings = EvaluateConfig(allow_first_release=True, max_forgetting_nats=0.1)
    reference, forgotten = text_scores([2.0] * 18, "reference"), text_scores([2.5] * 18, "reference")
    scores = {
        "base": label_scores(right_answers(10)) + reference,
        "challenger": label_scores(right_answers(90)) + forgotten,
    }
    assert apply_rules(scores, settings).decision == "refuse"
    verdict = apply_rules(scores, settings, is_final=False)
    assert verdict.decision == "pass"
    rule = find_rule(verdict, "forgetting_unmerged")
    assert rule.value == pytest.approx(0.5)
    assert "the form that ships is judged by the limit of 0.1" in rule.text

    # No merge finds passages that are not there.
    few = {name: [s for s in rows if s.suite != "reference"] for name, rows in scores.items()}
    assert apply_rules(few, settings, is_final=False).decision == "insufficient evidence"


@pytest.mark.parametrize(("lost", "decision"), [(0.9, "pass"), (1.1, "refuse")])
def test_forgetting_has_a_limit_by_default_where_there_are_passages_enough(lost: float, decision: str) -> None:
    base, challenger = label_scores(right_answers(10)), label_scores(right_answers(90))

    def verdict_for(passages: int) -> Verdict:
        before, after = (text_scores([2.0 + nats] * passages, "reference") for nats in (0.0, lost))
        return apply_rules({"base": base + before, "challenger": challenger + after}, FIRST)

    assert verdict_for(16).decision == decision
    # Fewer refuse nothing, and the verdict says so.
    verdict = verdict_for(15)
    assert verdict.decision == "pass"
    assert "forgetting was not judged: reference text has 15 passages" in verdict.sentence
    assert "forgetting" not in [rule.name for rule in verdict_for(0).rules]
    reported = FIRST.model_copy(update={"max_forgetting_nats": None})
    scores = {
        "base": base + text_scores([2.0] * 16, "reference"),
        "challenger": challenger + text_scores([9.0] * 16, "reference"),
    }
    assert apply_rules(scores, reported).decision == "pass"


def passage_scores(hits: Sequence[int], tokens: Sequence[int]) -> list[RowScore]:
    return [
        RowScore(f"reference{i}", "reference", 2.0 * t, t, hits=h)
        for i, (h, t) in enumerate(zip(hits, tokens, strict=True))
    ]


def test_forgetting_in_right_tokens_is_refused_and_few_tokens_never_prove_that_nothing_was_forgotten() -> None:
    base, challenger = label_scores(right_answers(10)), label_scores(right_answers(90))

    def verdict_for(hits: int, limit: float, tokens: int = 50) -> Verdict:
        settings = EvaluateConfig(allow_first_release=True, max_forgetting_accuracy=limit)
        ours, theirs = passage_scores([hits] * 18, [tokens] * 18), passage_scores([tokens // 2] * 18, [tokens] * 18)
        return apply_rules({"base": base + theirs, "challenger": challenger + ours}, settings)

    assert verdict_for(20, 0.02).decision == "refuse"
    assert find_rule(verdict_for(20, 0.02), "forgetting_accuracy").value == pytest.approx(0.1)
    assert verdict_for(25, 0.02).decision == "pass"

    # All passages are alike, so a plain bootstrap would report an interval of width 0 and pass these.
    assert verdict_for(25, 0.0005).decision == "refuse"
    assert verdict_for(1, 0.02, tokens=3).decision == "refuse"


def test_passages_without_a_scored_token_are_no_evidence() -> None:
    settings = EvaluateConfig(allow_first_release=True, max_forgetting_nats=0.1)
    # 40 passages in all, so only those with tokens may count towards the 16.
    for scored in (0, 15):
        reference = passage_scores([0] * 40, [9] * scored + [0] * (40 - scored))
        scores = {
            "base": label_scores(right_answers(10)) + reference,
            "challenger": label_scores(right_answers(90)) + reference,
        }
        verdict = apply_rules(scores, settings)
        assert verdict.decision == "insufficient evidence"
        assert f"there are {scored} passages of reference text" in verdict.sentence


def json_scores(is_valid: Sequence[bool | None], suite: str = "eval") -> list[RowScore]:
    """Make rows whose JSON is valid or not; None where the answer is not JSON, so the metric is not defined."""
    return [
        RowScore(f"{suite}{i}", suite, 1.0, 2, values={} if hit is None else {"json_validity": float(hit)})
        for i, hit in enumerate(is_valid)
    ]


def test_rows_for_which_the_primary_metric_is_not_defined_are_no_evidence() -> None:
    settings = EvaluateConfig(allow_first_release=True, metrics=["json_validity"], primary_metric="json_validity")
    undefined: list[bool | None] = [None] * 40
    # 45 rows, of which 5 have the metric: fewer than the 30 of min_prompts.
    base, challenger = json_scores([False] * 5 + undefined), json_scores([True] * 5 + undefined)
    verdict = apply_rules({"base": base, "challenger": challenger}, settings)
    assert verdict.decision == "insufficient evidence"
    assert "it is defined for evaluation rows of 5 different prompts; at least 30 are needed" in verdict.sentence

    base, challenger = json_scores([False] * 30 + undefined), json_scores([True] * 30 + undefined)
    assert apply_rules({"base": base, "challenger": challenger}, settings).decision == "pass"

    golden = json_scores([None] * 12, "golden")
    verdict = apply_rules({"base": base + golden, "challenger": challenger + golden}, settings)
    assert verdict.decision == "insufficient evidence"
    assert "0 golden rows of 0 different prompts beside 12 rows for which" in verdict.sentence


def test_merging_that_costs_more_than_allowed_fails_its_rule() -> None:
    unmerged = text_scores([1.0 + i / 100 for i in range(40)])
    merged = text_scores([1.03 + i / 100 for i in range(40)])
    assert merge_cost(unmerged, merged, 0.05, FIRST).passed is True
    cost = merge_cost(unmerged, merged, 0.02, FIRST)
    assert cost.passed is False
    assert cost.value == pytest.approx(0.03)

    scores = {"base": text_scores([3.0] * 40), "challenger": merged}
    assert apply_rules(scores, FIRST, extra=[cost]).decision == "refuse"


def test_contestants_with_different_rows_are_a_bug_and_no_refusal() -> None:
    with pytest.raises(ValueError, match="different eval rows"):
        apply_rules({"base": text_scores([1.0] * 40), "challenger": text_scores([1.0] * 41)}, FIRST)


def test_metrics_hold_loss_perplexity_accuracy_and_macro_f1() -> None:
    rows = label_scores([True, True, True, False])
    answers = {"eval0": "a", "eval1": "a", "eval2": "a", "eval3": "c"}
    metrics = compute_metrics(rows, FIRST, answers)
    assert metrics["loss"] == pytest.approx(3.6 / 8)
    assert metrics["perplexity"] == pytest.approx(math.exp(3.6 / 8))
    assert metrics["accuracy"] == pytest.approx(0.75)
    assert metrics["macro_f1"] == pytest.approx(1 / 3)  # a: 1, c: 0, and b, which was predicted once: 0
    assert metrics["rows"] == 4
    assert compute_metrics([], FIRST, {}) == {}

    # exp() keeps the order, so the ends of the perplexity are those of the loss.
    for metric in ("loss", "perplexity", "accuracy", "macro_f1"):
        assert metrics[f"{metric}_low"] <= metrics[metric] < metrics[f"{metric}_high"], metric
    assert metrics["perplexity_high"] == pytest.approx(math.exp(metrics["loss_high"]))


def test_a_floor_under_macro_f1_has_an_interval() -> None:
    def balanced_scores(right: int) -> list[RowScore]:
        return [
            RowScore(str(i), "eval", 1.0, 2, "ab"[(i + (not hit)) % 2], hit, slices=(f"label={'ab'[i % 2]}",))
            for i, hit in enumerate(right_answers(right))
        ]

    verdict = apply_rules(
        {"base": balanced_scores(10), "challenger": balanced_scores(80)},
        FIRST.model_copy(update={"floors": {"macro_f1": 0.7}}),
    )
    floor = find_rule(verdict, "macro_f1_floor")
    assert floor.passed
    assert (floor.low, floor.value, floor.high) == pytest.approx((0.72, 0.8, 0.87), abs=0.02)
