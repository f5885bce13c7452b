"""Intervals, McNemar's test and macro-F1, each against numbers computed in another way."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from qlora_retrain import stats

HOW = {"confidence": 0.95, "samples": 4000, "seed": 7}


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation() -> None:
    draw = random.Random(3)
    values = [draw.gauss(0.5, 1.0) for _ in range(400)]
    found = stats.ratio_interval(values, None, **HOW)
    error = statistics.pstdev(values) / math.sqrt(len(values))
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)


def test_a_small_bootstrap_agrees_with_every_draw_counted() -> None:
    losses, tokens = [1.0, 6.0, 2.0, 3.0], [1, 4, 1, 3]
    draws = itertools.product(range(4), repeat=4)
    ratios = sorted(sum(losses[i] for i in d) / sum(tokens[i] for i in d) for d in draws)
    found = stats.ratio_interval(losses, tokens, confidence=0.8, samples=50_000, seed=0)
    assert found.value == pytest.approx(12 / 9)
    assert found.low == pytest.approx(ratios[round(0.1 * 256)], abs=0.03)
    assert found.high == pytest.approx(ratios[round(0.9 * 256)], abs=0.03)


def test_long_rows_weigh_more_in_a_loss_a_token() -> None:
    found = stats.ratio_interval([1.0, 30.0], [1, 10], **HOW)
    assert found.value == pytest.approx(31 / 11)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(3.0))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = [float(i % 7) for i in range(50)]
    first = stats.ratio_interval(values, None, **HOW)
    assert first == stats.ratio_interval(values, None, **HOW)
    assert first != stats.ratio_interval(values, None, **{**HOW, "seed": 8})


def test_an_interval_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        stats.ratio_interval([], None, **HOW)


def test_drawing_in_parts_is_the_same_as_drawing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 5) for i in range(30)]
    whole = stats.ratio_interval(values, None, **HOW)
    monkeypatch.setattr(stats, "_CELLS", 1000)
    assert stats.ratio_interval(values, None, **HOW) == whole


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 1), (3, 12), (40, 40), (900, 700)])
def test_mcnemar_agrees_with_the_binomial_test(only_first: int, only_second: int) -> None:
    from scipy.stats import binomtest

    first = [True] * only_first + [False] * only_second + [True, False] * 10
    second = [False] * only_first + [True] * only_second + [True, False] * 10
    expected = binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    assert stats.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_macro_f1_is_the_mean_of_the_labels_harmonic_means() -> None:
    answers = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "d", "a"]
    precision = {"a": 2 / 3, "b": 1 / 2}
    recall = {"a": 2 / 3, "b": 1 / 2}
    expected = [statistics.harmonic_mean([precision[x], recall[x]]) for x in "ab"] + [0.0, 0.0]  # c and d: no hits
    assert stats.macro_f1(answers, predicted) == pytest.approx(statistics.fmean(expected))
