"""The recommendation on scores whose answer is known: a clear winner, noise, a cheaper equal, a useless adapter."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import stats
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.lab import report, summary
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.recommend import Recommendation, cheaper_by, ranked, recommend
from qlora_retrain.lab.report import pareto_front
from qlora_retrain.lab.results import Candidate, SeedResult, interval_json, value_interval

SETTINGS = EvaluateConfig(bootstrap_samples=300)
PROMPTS = 200


def rows(is_right: Sequence[bool], loss: float = 1.0) -> list[RowScore]:
    return [
        RowScore(f"row {i}", "eval", loss * (2 - right), 2, predicted="x", correct=right, prompt_id=f"prompt {i}")
        for i, right in enumerate(is_right)
    ]


def right(count: int, *, also: Sequence[int] = (), without: Sequence[int] = ()) -> list[bool]:
    return [(i < count or i in also) and i not in without for i in range(PROMPTS)]


def candidate(
    name: str, *answers: Sequence[bool], mib: float = 1.0, memory: float = 100.0, seconds: float = 10.0, **settings: Any
) -> Candidate:
    """A candidate with one seed for each list of answers; the base is right on a quarter of the rows."""
    result = Candidate(name, settings or {"train.name": name})
    for seed, is_right in enumerate(answers):
        scores = rows(is_right)
        numbers = {
            "seed": seed, "run": f"run-{name}-{seed}",
            "metric": interval_json(value_interval(scores, "accuracy", SETTINGS)),
            "loss": interval_json(value_interval(scores, "loss", SETTINGS)),
            "adapter_bytes": int(mib * 2**20), "peak_memory_mib": memory, "training_seconds": seconds,
            "trainable_parameters": int(mib * 2**19), "tokens_per_second": 50.0 + seed, "steps": 3,
            "intruder_dimensions": 2, "forgetting_nats": None, "merge_loss_nats": None,
        }  # fmt: skip
        point = Point((("train.name", name),), seed if len(answers) > 1 else None)
        result.results.append(SeedResult(point, numbers, scores, rows(right(50)), "accuracy"))
    return result


def answer(*candidates: Candidate) -> Recommendation:
    return recommend(ranked(candidates, "accuracy", SETTINGS), "accuracy", SETTINGS)


def test_a_clear_winner_is_taken_whatever_it_costs() -> None:
    result = answer(candidate("rank 8", right(100)), candidate("rank 64", right(180), mib=8))
    assert (result.take, result.best) == ("rank 64", "rank 64")
    assert result.sentence == "rank 64 is better than every other point, by more than chance on 200 prompts: take it."
    assert result.comparisons[0].as_json()["verdict"] == "worse"
    expected = stats.paired_proportion_interval(right(180), right(100), confidence=0.95)
    assert result.comparisons[0].gain == expected


def test_a_cheaper_point_within_chance_is_taken() -> None:
    # Each is right on some rows on which the other is wrong: 152 against 150.
    small = candidate("rank 8", right(150, also=[190, 191, 192], without=[3, 4, 5]))
    result = answer(small, candidate("rank 64", right(152), mib=8), candidate("rank 4", right(100), mib=0.5))
    assert (result.take, result.best) == ("rank 8", "rank 64")
    assert result.sentence.startswith(
        "rank 8 is as good as rank 64 within what 200 prompts can show (rank 64 is ahead by"
    )
    assert result.sentence.endswith("its adapter has 1.00 MiB instead of 8.00: take rank 8.")
    # The ends of the interval are in the sentence, since "as good as" is never more than that.
    gain = stats.paired_proportion_interval(
        right(152), right(150, also=[190, 191, 192], without=[3, 4, 5]), confidence=0.95
    )
    assert gain.low < 0 < gain.high
    assert f"{gain.low:+.4f} to {gain.high:+.4f}" in result.sentence
    assert f"rank 8 may still be worse than rank 64 by up to {gain.high:.4f} accuracy" in result.notes[0]


def test_a_difference_within_chance_at_the_same_cost_is_called_noise() -> None:
    result = answer(candidate("rate 1e-4", right(150)), candidate("rate 2e-4", right(152)))
    assert result.take == "rate 2e-4"
    assert "200 prompts cannot tell it apart from rate 1e-4. None of these costs less" in result.sentence


def test_an_equal_value_is_not_called_a_worse_one() -> None:
    result = answer(candidate("rank 8", right(150)), candidate("rank 64", right(150), mib=8))
    assert result.sentence == "rank 8 has the best value, as rank 64. None of these costs less: take rank 8."


def test_points_without_a_common_seed_are_not_called_worse_or_equal() -> None:
    best, clear = candidate("rank 8", right(180), right(180)), candidate("rank 4", right(20), right(20))
    apart = candidate("rank 2", right(20), right(20), right(20))
    del apart.results[:2]
    sentence = answer(best, clear, apart).sentence
    assert "every other point but rank 2, with which it has no seed in common, by more than chance" in sentence
    assert answer(best, apart).sentence == (
        "rank 8 has the best value, and no seed in common with another point: take no conclusion."
    )


def test_a_cheaper_point_that_is_far_behind_is_not_taken_where_few_rows_prove_nothing() -> None:
    # 5 of 200 rows are 0.025, beyond the line's margin of 0.02.
    small = candidate("rank 8", right(150, also=[190, 191], without=range(7)))
    result = answer(small, candidate("rank 64", right(150), mib=8))
    assert result.comparisons[0].is_within_chance
    assert result.take == "rank 64"
    assert "behind by more than 0.02 (evaluate.max_loss_to_champion)" in result.sentence
    wider = SETTINGS.model_copy(update={"max_loss_to_champion": 0.03})
    order = ranked([small, candidate("rank 64", right(150), mib=8)], "accuracy", wider)
    assert recommend(order, "accuracy", wider).take == "rank 8"


def test_the_cheapest_of_several_equal_points_is_taken() -> None:
    others = [candidate(f"rank {2**k}", right(150 - k), mib=2.0**k) for k in range(5)]
    assert answer(*others).take == "rank 1"


def test_costs_are_compared_in_order_and_memory_and_time_beyond_their_scatter() -> None:
    plain = candidate("a", right(9))
    assert cheaper_by(candidate("b", right(9), mib=0.5, seconds=99), plain) == "adapter_bytes"
    assert cheaper_by(candidate("b", right(9), memory=97, seconds=5), plain) == "training_seconds"
    assert cheaper_by(candidate("b", right(9), memory=90, seconds=99), plain) == "peak_memory_mib"
    assert cheaper_by(candidate("b", right(9), memory=200, seconds=5), plain) is None
    assert cheaper_by(candidate("b", right(9), seconds=9.5), plain) is None


def test_more_seeds_are_no_more_prompts() -> None:
    answers = (right(152), right(150, also=[190], without=[3]))
    single = answer(candidate("a", answers[0]), candidate("b", answers[1], mib=0.5))
    three = answer(candidate("a", *[answers[0]] * 3), candidate("b", *[answers[1]] * 3, mib=0.5))
    assert single.comparisons[0].gain is not None
    assert three.comparisons[0].gain is not None
    width_of_one, width_of_three = (r.comparisons[0].gain.high - r.comparisons[0].gain.low for r in (single, three))  # type: ignore[union-attr]
    # Independent rows would make it 1.73 times as narrow.
    assert width_of_three > width_of_one * 0.85
    assert three.take == single.take == "b"


def test_notes_say_what_seeds_and_failed_runs_leave_open() -> None:
    single = answer(candidate("a", right(152)), candidate("b", right(100)))
    assert any("One seed was trained" in note for note in single.notes)
    several = answer(candidate("a", right(152), right(140)), candidate("b", right(100)))
    assert any("differs by up to 0.0600" in note for note in several.notes)
    assert any("Some points have fewer seeds" in note for note in several.notes)


def test_an_adapter_that_is_no_better_than_the_base_is_not_praised() -> None:
    result = answer(candidate("a", right(52)), candidate("b", right(50), mib=2))
    assert any(
        "a is not certainly better than the base without an adapter: +0.0100 accuracy" in n for n in result.notes
    )


def test_a_single_point_is_compared_with_nothing() -> None:
    assert answer(candidate("a", right(9))).sentence.startswith("Only a was measured")


def test_of_losses_the_lower_one_is_better() -> None:
    order = ranked([candidate("worse", right(20)), candidate("better", right(190))], "loss", SETTINGS)
    assert [c.label for c in order] == ["better", "worse"]
    result = recommend(order, "loss", SETTINGS)
    assert result.take == "better"
    assert result.comparisons[0].gain is not None
    assert result.comparisons[0].gain.low > 0


def test_the_front_has_the_points_that_no_other_beats_in_both() -> None:
    generator = random.Random(0)
    points = [(generator.randrange(9), generator.randrange(9)) for _ in range(60)]
    for is_lower_better in (False, True):
        better = (lambda a, b: a < b) if is_lower_better else (lambda a, b: a > b)
        for (x, y), is_on_front in zip(points, pareto_front(points, is_lower_better=is_lower_better), strict=True):
            beaten = any((a <= x and (better(b, y) or b == y)) and (a < x or better(b, y)) for a, b in points)
            assert is_on_front is not beaten


def test_the_page_has_the_numbers_of_the_document() -> None:
    small, large = candidate("rank 8", right(150), right(144)), candidate("rank 64", right(180), right(171), mib=8)
    candidates = ranked([small, large], "accuracy", SETTINGS)
    recommendation = recommend(candidates, "accuracy", SETTINGS)
    facts = {
        "line": "intents",
        "version": "0",
        "vary": {"train.rank": [8, 64]},
        "named": {},
        "seeds": 2,
        "judge_fraction": 0.1,
    }
    failed = [{"label": "rank 512, seed 0", "exit_code": 137, "message": "train: out of <memory> (137)"}]
    document = summary.summarise(
        facts, candidates, recommendation, "accuracy", SETTINGS, failed=failed, skipped=[("rank 0", "no rank")]
    )
    # What is written is read: the page is made of JSON alone.
    document = json.loads(json.dumps(document, allow_nan=False))
    page = report.render(document)

    assert [point["label"] for point in document["points"]] == ["rank 64", "rank 8"]
    for point, answers in zip(document["points"], ((180, 171), (150, 144)), strict=True):
        value = sum(answers) / (2 * PROMPTS)
        assert point["metric"]["value"] == pytest.approx(value)
        assert point["metric_range"] == pytest.approx([min(answers) / PROMPTS, max(answers) / PROMPTS])
        assert point["tokens_per_second"] == 50.5
        interval = point["metric"]
        for number in (f"{value:.4f}", f"{interval['low']:.4f} to {interval['high']:.4f}"):
            assert number in page
    for comparison in document["comparisons"]:
        gain = comparison["gain"]
        assert f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" in page
    assert (document["judge_rows"], document["judge_prompts"]) == (PROMPTS, PROMPTS)
    assert "137" in page
    assert "out of &lt;memory&gt;" in page
    assert "no rank" in page
    assert recommendation.sentence in page
    assert len(re.findall("<svg", page)) == 3


def test_a_page_without_costs_and_losses_is_made_too() -> None:
    only = candidate("a", right(9))
    only.results[0].numbers.update(peak_memory_mib=None, tokens_per_second=None, intruder_dimensions=None, loss=None)
    document = summary.summarise(
        {"line": "x", "version": "0", "vary": {}, "named": {}, "seeds": None, "judge_fraction": 0.1},
        [only], answer(only), "accuracy", SETTINGS, failed=[], skipped=[],
    )  # fmt: skip
    page = report.render(json.loads(json.dumps(document)))
    assert "nothing was measured" in page
    assert math.isclose(document["points"][0]["metric"]["value"], 9 / PROMPTS)
