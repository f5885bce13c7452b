"""How often chance passes or fails an answer that is right or wrong, with every outcome weighed by its probability.

No seed and no luck: of n paired rows only two counts matter, how many the one contestant alone has right and how many
the other, so all outcomes are put through the rules. Those too rare to be looked at count as passed. The figures are in
docs/verdict.md; what has no such closed form is in test_false_passes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from scipy.stats import binom, multinomial

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import overall, sliced

MARGIN = 0.05
RARE = 1e-7
Passes = Callable[[list[RowScore], list[RowScore]], bool]  # of the better and the worse contestant's answers


def answers(right: list[bool]) -> list[RowScore]:
    return [
        RowScore(str(i), "eval", 1.0, 2, "a" if hit else "b", hit, slices=("label=a",)) for i, hit in enumerate(right)
    ]


def outcomes(rows: int, lost: float, won: float) -> Iterator[tuple[float, int, int]]:
    """(probability, rows lost, rows won) of every outcome that is not rare; rows are lost and won as often as said."""
    for b in range(rows + 1):
        for c in range(rows + 1 - b):
            weight = float(multinomial.pmf([b, c, rows - b - c], rows, [lost, won, 1 - lost - won]))
            if weight > RARE:
                yield weight, b, c


def passed_by_chance(passes: Passes, rows: int, lost: float, won: float) -> float:
    """The share of challengers that pass, at most."""
    seen = passed = 0.0
    for weight, b, c in outcomes(rows, lost, won):
        both = [True] * (rows - b - c)
        seen += weight
        passed += weight * passes(answers([True] * b + [False] * c + both), answers([False] * b + [True] * c + both))
    assert seen > 0.999
    return passed + 1 - seen


def against_the_champion(better: list[RowScore], worse: list[RowScore]) -> bool:
    scores = {"champion": better, "challenger": worse}
    settings = EvaluateConfig(max_loss_to_champion=MARGIN)
    return next(overall.losses(scores, "accuracy", settings)).passed is True


def against_the_base(better: list[RowScore], worse: list[RowScore]) -> bool:
    scores = {"base": worse, "challenger": better}
    return overall.gain_over_base(scores, "accuracy", EvaluateConfig(min_gain_over_base=MARGIN)).passed is True


@pytest.mark.parametrize("passes", [against_the_champion, against_the_base])
@pytest.mark.parametrize(
    ("rows", "lost", "won"), [(100, 0.15, 0.10), (40, 0.15, 0.10), (100, 0.05, 0.0), (400, 0.05, 0.0)]
)
def test_at_the_margin_at_most_one_in_twenty_passes(passes: Passes, rows: int, lost: float, won: float) -> None:
    rate = passed_by_chance(passes, rows, lost, won)
    print(f"\n{passes.__name__}, {rows} rows, loses {lost:.0%}, wins {won:.0%}: {rate:.2%} passed")
    assert rate <= 0.05


@pytest.mark.parametrize(("truth", "expected"), [(0.8, 0.63), (0.7, 0.238), (0.6, 0.051)])
def test_a_floor_of_a_slice_is_held_against_what_was_measured(truth: float, expected: float) -> None:
    """A floor is no proof: at the floor itself more than half pass, and 20 points below it one in twenty does."""
    settings, passed = EvaluateConfig(slice_floor=0.8, max_slice_loss=None), 0.0
    for hits in range(21):
        rows = answers([i < hits for i in range(20)])
        scores = {"base": rows, "challenger": rows}
        (rule,) = sliced.all_of(scores, settings, sliced.measure(scores, settings))
        passed += float(binom.pmf(hits, 20, truth)) * (rule.passed is True)
    assert passed == pytest.approx(expected, abs=0.001)
