"""Compute how often chance passes right-or-wrong answers, with every outcome weighed by its probability.

There is no seed. Of n paired rows only two counts matter: how many only the one contestant has right, and how many only
the other. So all outcomes are put through the rules. Outcomes too rare to be computed count as passed. The figures are
in benchmarks/RESULTS.md; the kinds without such a closed form are in test_false_passes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from scipy.stats import binom, multinomial

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import slice_rules, suite_rules

MARGIN = 0.05
RARE = 1e-7
Passes = Callable[[list[RowScore], list[RowScore]], bool]  # of the better and the worse contestant's answers


def answer_scores(right: list[bool]) -> list[RowScore]:
    return [
        RowScore(str(i), "eval", 1.0, 2, "a" if hit else "b", hit, slices=("label=a",)) for i, hit in enumerate(right)
    ]


def outcomes(rows: int, lost: float, won: float) -> Iterator[tuple[float, int, int]]:
    """Yield (probability, rows lost, rows won) of every outcome that is not rare; `lost`, `won`: rates per row."""
    for b in range(rows + 1):
        for c in range(rows + 1 - b):
            weight = float(multinomial.pmf([b, c, rows - b - c], rows, [lost, won, 1 - lost - won]))
            if weight > RARE:
                yield weight, b, c


def passed_by_chance(passes: Passes, rows: int, lost: float, won: float) -> float:
    """Return the largest share of challengers that can pass."""
    total = passed = 0.0
    for weight, b, c in outcomes(rows, lost, won):
        both = [True] * (rows - b - c)
        # b rows that only the better one has right, c rows that only the worse one has, and rows that both have.
        better = answer_scores([True] * b + [False] * c + both)
        worse = answer_scores([False] * b + [True] * c + both)
        total += weight
        passed += weight * passes(better, worse)

    # What is too rare to be computed counts as passed, so the result is an upper bound.
    assert total > 0.999
    return passed + 1 - total


def against_the_champion(better: list[RowScore], worse: list[RowScore]) -> bool:
    scores = {"champion": better, "challenger": worse}
    settings = EvaluateConfig(max_loss_to_champion=MARGIN)
    return next(suite_rules.losses_to_rivals(scores, "accuracy", settings)).passed is True


def against_the_base(better: list[RowScore], worse: list[RowScore]) -> bool:
    scores = {"base": worse, "challenger": better}
    return suite_rules.gain_over_base(scores, "accuracy", EvaluateConfig(min_gain_over_base=MARGIN)).passed is True


@pytest.mark.parametrize("passes", [against_the_champion, against_the_base])
@pytest.mark.parametrize(
    ("rows", "lost", "won"), [(100, 0.15, 0.10), (40, 0.15, 0.10), (100, 0.05, 0.0), (400, 0.05, 0.0)]
)
def test_at_the_margin_at_most_one_in_twenty_passes(passes: Passes, rows: int, lost: float, won: float) -> None:
    rate = passed_by_chance(passes, rows, lost, won)
    print(f"\n{passes.__name__}, {rows} rows, loses {lost:.0%}, wins {won:.0%}: {rate:.2%} passed")
    assert rate <= 0.05


@pytest.mark.parametrize(("truth", "expected"), [(0.8, 0.63), (0.7, 0.238), (0.6, 0.051)])
def test_a_floor_of_a_slice_is_compared_with_the_measured_value(truth: float, expected: float) -> None:
    """A floor proves nothing: at the floor itself more than half pass, and 20 points below it one in twenty does."""
    settings, passed = EvaluateConfig(slice_floor=0.8, max_slice_regression=None), 0.0
    for hits in range(21):
        rows = answer_scores([i < hits for i in range(20)])
        scores = {"base": rows, "challenger": rows}
        (rule,) = slice_rules.apply(scores, settings, slice_rules.compare_slices(scores, settings))
        passed += float(binom.pmf(hits, 20, truth)) * (rule.passed is True)
    assert passed == pytest.approx(expected, abs=0.001)
