"""Intervals, McNemar's test and macro-F1, each against numbers computed in another way."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from qlora_retrain.evaluation import stats

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


def share_of(bits: int, count: int) -> list[bool]:
    return [i < bits for i in range(count)]


def plain_tango(b: int, c: int, n: int, difference: float) -> float:
    """The score statistic with its nuisance parameter found by maximising the likelihood, not by Tango's formula."""
    from scipy.optimize import minimize_scalar

    def loss(q: float) -> float:
        p = q + difference
        rest = 1 - p - q
        terms = [(b, p), (c, q), (n - b - c, rest)]
        return -sum(k * math.log(max(x, 1e-300)) for k, x in terms if k)

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("b", "c", "n"), [(14, 5, 100), (0, 6, 40), (30, 31, 80), (3, 0, 200)])
def test_the_interval_of_paired_shares_ends_where_the_score_test_says(b: int, c: int, n: int) -> None:
    first = [True] * b + [False] * c + [True] * (n - b - c)
    second = [False] * b + [True] * c + [True] * (n - b - c)
    found = stats.paired_proportions(first, second, confidence=0.95)
    assert found.value == pytest.approx((b - c) / n)
    assert plain_tango(b, c, n, found.low) == pytest.approx(1.95996, abs=2e-3)
    assert plain_tango(b, c, n, found.high) == pytest.approx(-1.95996, abs=2e-3)


def test_rows_answered_all_alike_rule_out_only_what_so_many_rows_can() -> None:
    found = stats.paired_proportions([True] * 190, [True] * 190, confidence=0.95)
    assert (found.value, found.low) == (0.0, pytest.approx(-found.high))
    assert found.high == pytest.approx(1.95996**2 / (190 + 1.95996**2), rel=1e-4)
    assert stats.smallest_excluded(190, 0.95) == pytest.approx(found.high)


def test_the_interval_of_paired_shares_holds_the_truth_as_often_as_it_says() -> None:
    """Every outcome of 60 rows, weighed by its probability."""
    from scipy.stats import multinomial

    n, p, q = 60, 0.08, 0.03
    missed_low = missed_high = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            weight = float(multinomial.pmf([b, c, n - b - c], n, [p, q, 1 - p - q]))
            if weight > 1e-9:
                found = stats.paired_proportions(share_of(b, b + c) + [True] * (n - b - c),
                                                 [not x for x in share_of(b, b + c)] + [True] * (n - b - c),
                                                 confidence=0.95)  # fmt: skip
                missed_low += weight * (found.low > p - q)
                missed_high += weight * (found.high < p - q)
    assert missed_low < 0.03
    assert missed_high < 0.03


def test_a_difference_that_few_rows_make_gets_the_wider_interval() -> None:
    draw = random.Random(1)
    values = [draw.lognormvariate(0, 1) for _ in range(60)]
    plain, wide = stats.ratio_interval(values, None, **HOW), stats.difference_interval(values, None, **HOW)
    assert wide.value == plain.value
    assert wide.low <= plain.low
    assert wide.high > plain.high + 0.1 * (plain.high - plain.value)


def test_on_the_side_of_the_long_tail_the_studentized_interval_is_taken_further_out() -> None:
    """The same ends from a bootstrap of this test's own, with plain sums."""
    draw, n = random.Random(4), 50
    values, weights = [draw.lognormvariate(0, 1) for _ in range(n)], [draw.randint(3, 20) for _ in range(n)]

    def mean_and_error(rows: list[int]) -> tuple[float, float]:
        tokens = sum(weights[i] for i in rows)
        mean = sum(values[i] * weights[i] for i in rows) / tokens
        squares = sum((values[i] * weights[i] - mean * weights[i]) ** 2 for i in rows)
        return mean, math.sqrt(squares * n / (n - 1)) / tokens

    value, error = mean_and_error(list(range(n)))
    parts = [(x - value) * w for x, w in zip(values, weights, strict=True)]
    spread = math.sqrt(statistics.fmean(p * p for p in parts))
    skewness = statistics.fmean(p**3 for p in parts) / spread**3
    again = [mean_and_error(draw.choices(range(n), k=n)) for _ in range(20_000)]
    pivots = sorted((mean - value) / e for mean, e in again)
    low = value - pivots[round(0.975 * 20_000)] * error
    high = value - pivots[round(0.025 / (1 + 6 * skewness / math.sqrt(n)) * 20_000)] * error
    sums = [x * w for x, w in zip(values, weights, strict=True)]
    found = stats.difference_interval(sums, weights, confidence=0.95, samples=20_000, seed=0)
    assert skewness > 1
    assert found.high == pytest.approx(high, abs=0.1 * error)
    plain = value - pivots[round(0.025 * 20_000)] * error
    assert high > plain + 0.3 * error
    assert found.low == pytest.approx(min(low, sorted(mean for mean, _ in again)[500]), abs=0.1 * error)


def test_a_difference_seen_from_the_other_side_has_the_same_interval() -> None:
    draw = random.Random(5)
    values = [draw.lognormvariate(0, 1) - 1 for _ in range(40)]
    found = stats.difference_interval([-x for x in values], None, **HOW)
    seen = stats.difference_interval(values, None, **HOW).negative
    assert (found.value, found.low, found.high) == pytest.approx((seen.value, seen.low, seen.high))


def test_an_even_difference_gets_about_the_same_interval_from_both() -> None:
    draw = random.Random(2)
    values, weights = [draw.gauss(1, 2) for _ in range(400)], [draw.randint(3, 30) for _ in range(400)]
    plain, wide = stats.ratio_interval(values, weights, **HOW), stats.difference_interval(values, weights, **HOW)
    assert wide.low == pytest.approx(plain.low, abs=0.1 * (plain.high - plain.low))
    assert wide.high == pytest.approx(plain.high, abs=0.1 * (plain.high - plain.low))


def test_bounded_differences_that_are_all_0_still_have_a_width() -> None:
    found = stats.difference_interval([0.0] * 98, None, **HOW, bounded=True)
    assert found.value == 0
    assert 0.015 < found.high == pytest.approx(-found.low, rel=0.1)


@pytest.mark.parametrize(("hits", "rows"), [(0, 12), (12, 12), (31, 59), (59, 59)])
def test_the_interval_of_a_share_is_wilsons(hits: int, rows: int) -> None:
    from scipy.stats import binomtest

    found, expected = (
        stats.proportion(hits, rows, confidence=0.95),
        binomtest(hits, rows).proportion_ci(method="wilson"),
    )
    assert found.value == hits / rows
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


def test_the_interval_of_macro_f1_is_that_of_the_rows_drawn_again() -> None:
    draw = random.Random(9)
    answers = [draw.choice("abcd") for _ in range(60)]
    predicted = [a if draw.random() < 0.7 else draw.choice("abcd") for a in answers]
    again = []
    for _ in range(4000):
        rows = draw.choices(range(60), k=60)
        again.append(stats.macro_f1([answers[i] for i in rows], [predicted[i] for i in rows]))
    again.sort()
    found = stats.macro_f1_interval(answers, predicted, **HOW)
    assert found.value == stats.macro_f1(answers, predicted)
    assert found.low == pytest.approx(again[100], abs=0.015)
    assert found.high == pytest.approx(again[3899], abs=0.015)
    assert stats.macro_f1_interval(answers, answers, **HOW) == stats.Interval(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least one row"):
        stats.macro_f1_interval([], [], **HOW)


def test_an_end_beyond_what_the_draws_resolve_is_not_nearer_than_students_t() -> None:
    """One of 80 slices: 2,000 draws have less than one at the probability that is asked for."""
    from scipy.stats import t

    draw, sure = random.Random(11), 1 - 0.05 / 80
    values = [draw.gauss(0.0, 1.0) for _ in range(400)]
    reach = t.ppf((1 + sure) / 2, 399) * statistics.stdev(values) / 20
    for seed in range(8):
        found = stats.difference_interval(values, None, confidence=sure, samples=2000, seed=seed)
        assert found.low <= statistics.fmean(values) - 0.999 * reach
        assert found.high >= statistics.fmean(values) + 0.999 * reach
        assert found.high - found.low < 2.6 * reach
