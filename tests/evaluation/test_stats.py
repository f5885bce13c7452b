"""Check intervals, McNemar's test and macro-F1, each against numbers computed in another way."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace

import pytest

from qlora_retrain.evaluation import bootstrap, stats
from qlora_retrain.evaluation.bootstrap import BootstrapSettings

SETTINGS = BootstrapSettings(confidence=0.95, samples=4000, seed=7)


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation() -> None:
    generator = random.Random(3)
    values = [generator.gauss(0.5, 1.0) for _ in range(400)]
    interval = bootstrap.ratio_interval(values, None, SETTINGS)
    error = statistics.pstdev(values) / math.sqrt(len(values))
    assert interval.value == pytest.approx(statistics.fmean(values))
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.15 * error)


def test_a_small_bootstrap_agrees_with_every_draw_counted() -> None:
    losses, tokens = [1.0, 6.0, 2.0, 3.0], [1, 4, 1, 3]
    draws = itertools.product(range(4), repeat=4)
    # All 256 resamples, each equally likely, so the quantiles are known exactly.
    ratios = sorted(sum(losses[i] for i in d) / sum(tokens[i] for i in d) for d in draws)
    interval = bootstrap.ratio_interval(losses, tokens, BootstrapSettings(0.8, samples=50_000, seed=0))
    assert interval.value == pytest.approx(12 / 9)
    assert interval.low == pytest.approx(ratios[round(0.1 * 256)], abs=0.03)
    assert interval.high == pytest.approx(ratios[round(0.9 * 256)], abs=0.03)


def test_long_rows_weigh_more_in_a_loss_per_token() -> None:
    interval = bootstrap.ratio_interval([1.0, 30.0], [1, 10], SETTINGS)
    assert interval.value == pytest.approx(31 / 11)
    # A quarter of the resamples hold only the first row, and a quarter only the second.
    assert (interval.low, interval.high) == (pytest.approx(1.0), pytest.approx(3.0))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = [float(i % 7) for i in range(50)]
    first = bootstrap.ratio_interval(values, None, SETTINGS)
    assert first == bootstrap.ratio_interval(values, None, SETTINGS)
    assert first != bootstrap.ratio_interval(values, None, replace(SETTINGS, seed=8))


def test_an_interval_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap.ratio_interval([], None, SETTINGS)


def test_resampling_in_chunks_gives_the_same_interval_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 5) for i in range(30)]
    whole = bootstrap.ratio_interval(values, None, SETTINGS)
    # 1,000 indices are 33 resamples of 30 rows at a time, instead of all 4,000.
    monkeypatch.setattr(bootstrap, "_MAX_INDICES_AT_ONCE", 1000)
    assert bootstrap.ratio_interval(values, None, SETTINGS) == whole


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 1), (3, 12), (40, 40), (900, 700)])
def test_mcnemar_agrees_with_the_binomial_test(only_first: int, only_second: int) -> None:
    from scipy.stats import binomtest

    # The last 20 rows are answered alike; they must not matter.
    first = [True] * only_first + [False] * only_second + [True, False] * 10
    second = [False] * only_first + [True] * only_second + [True, False] * 10
    expected = binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    assert stats.mcnemar_p_value(first, second) == pytest.approx(expected, rel=1e-9)


def test_macro_f1_is_the_mean_of_the_labels_harmonic_means() -> None:
    answers = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "d", "a"]
    # Of three answers "a" two are hits, of three predictions "a" too; of two of each for "b" one is.
    precision = {"a": 2 / 3, "b": 1 / 2}
    recall = {"a": 2 / 3, "b": 1 / 2}
    expected = [statistics.harmonic_mean([precision[x], recall[x]]) for x in "ab"] + [0.0, 0.0]  # c and d: no hits
    assert stats.macro_f1(answers, predicted) == pytest.approx(statistics.fmean(expected))


def first_right(right: int, count: int) -> list[bool]:
    return [i < right for i in range(count)]


def plain_tango(b: int, c: int, n: int, difference: float) -> float:
    """Compute the score statistic with its nuisance parameter from a maximised likelihood, not Tango's formula."""
    from scipy.optimize import minimize_scalar

    def loss(q: float) -> float:
        p = q + difference
        terms = [(b, p), (c, q), (n - b - c, 1 - p - q)]
        return -sum(k * math.log(max(x, 1e-300)) for k, x in terms if k)

    # Both shares, q and q + difference, must be probabilities, and so must be what remains.
    low, high = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("b", "c", "n"), [(14, 5, 100), (0, 6, 40), (30, 31, 80), (3, 0, 200)])
def test_the_interval_of_paired_shares_ends_where_the_score_test_puts_it(b: int, c: int, n: int) -> None:
    first = [True] * b + [False] * c + [True] * (n - b - c)
    second = [False] * b + [True] * c + [True] * (n - b - c)
    interval = stats.paired_proportion_interval(first, second, confidence=0.95)
    assert interval.value == pytest.approx((b - c) / n)
    # 1.95996 is the normal quantile for 95 %, two-sided.
    assert plain_tango(b, c, n, interval.low) == pytest.approx(1.95996, abs=2e-3)
    assert plain_tango(b, c, n, interval.high) == pytest.approx(-1.95996, abs=2e-3)


def test_rows_that_are_all_answered_alike_rule_out_only_what_their_number_can() -> None:
    interval = stats.paired_proportion_interval([True] * 190, [True] * 190, confidence=0.95)
    assert (interval.value, interval.low) == (0.0, pytest.approx(-interval.high))
    assert interval.high == pytest.approx(1.95996**2 / (190 + 1.95996**2), rel=1e-4)
    assert stats.smallest_excludable_loss(190, 0.95) == pytest.approx(interval.high)


def test_the_interval_of_paired_shares_covers_the_truth_as_often_as_its_confidence() -> None:
    """The sum is over every outcome of 60 rows, weighed by its probability."""
    from scipy.stats import multinomial

    n, p, q = 60, 0.08, 0.03
    missed_low = missed_high = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            weight = float(multinomial.pmf([b, c, n - b - c], n, [p, q, 1 - p - q]))
            if weight > 1e-9:
                first = first_right(b, b + c) + [True] * (n - b - c)
                second = [not x for x in first_right(b, b + c)] + [True] * (n - b - c)
                interval = stats.paired_proportion_interval(first, second, confidence=0.95)
                missed_low += weight * (interval.low > p - q)
                missed_high += weight * (interval.high < p - q)

    # The nominal rate is 0.025 on either side.
    assert missed_low < 0.03
    assert missed_high < 0.03


def test_a_difference_caused_by_few_rows_gets_the_wider_interval() -> None:
    generator = random.Random(1)
    values = [generator.lognormvariate(0, 1) for _ in range(60)]
    plain, wide = (
        bootstrap.ratio_interval(values, None, SETTINGS),
        bootstrap.difference_interval(values, None, SETTINGS),
    )
    # The long tail is on the upper side.
    assert wide.value == plain.value
    assert wide.low <= plain.low
    assert wide.high > plain.high + 0.1 * (plain.high - plain.value)


def test_on_the_side_of_the_long_tail_the_studentized_interval_is_taken_further_out() -> None:
    """The expected ends come from a bootstrap of this test's own, with plain sums."""
    generator, n = random.Random(4), 50
    values, weights = [generator.lognormvariate(0, 1) for _ in range(n)], [generator.randint(3, 20) for _ in range(n)]

    def mean_and_error(rows: list[int]) -> tuple[float, float]:
        tokens = sum(weights[i] for i in rows)
        mean = sum(values[i] * weights[i] for i in rows) / tokens
        squares = sum((values[i] * weights[i] - mean * weights[i]) ** 2 for i in rows)
        return mean, math.sqrt(squares * n / (n - 1)) / tokens

    value, error = mean_and_error(list(range(n)))
    contributions = [(x - value) * w for x, w in zip(values, weights, strict=True)]
    deviation = math.sqrt(statistics.fmean(c * c for c in contributions))
    skewness = statistics.fmean(c**3 for c in contributions) / deviation**3

    resampled = [mean_and_error(generator.choices(range(n), k=n)) for _ in range(20_000)]
    pivots = sorted((mean - value) / e for mean, e in resampled)
    low = value - pivots[round(0.975 * 20_000)] * error
    high = value - pivots[round(0.025 / (1 + 6 * skewness / math.sqrt(n)) * 20_000)] * error
    sums = [x * w for x, w in zip(values, weights, strict=True)]

    interval = bootstrap.difference_interval(sums, weights, BootstrapSettings(0.95, samples=20_000, seed=0))
    assert skewness > 1
    assert interval.high == pytest.approx(high, abs=0.1 * error)

    # The correction for skewness must matter in this sample.
    plain = value - pivots[round(0.025 * 20_000)] * error
    assert high > plain + 0.3 * error
    assert interval.low == pytest.approx(min(low, sorted(mean for mean, _ in resampled)[500]), abs=0.1 * error)


def test_a_difference_seen_from_the_other_side_has_the_same_interval() -> None:
    generator = random.Random(5)
    values = [generator.lognormvariate(0, 1) - 1 for _ in range(40)]
    interval = bootstrap.difference_interval([-x for x in values], None, SETTINGS)
    negated = bootstrap.difference_interval(values, None, SETTINGS).negated
    assert (interval.value, interval.low, interval.high) == pytest.approx((negated.value, negated.low, negated.high))


def test_a_difference_without_skewness_gets_about_the_same_interval_from_both() -> None:
    generator = random.Random(2)
    values, weights = [generator.gauss(1, 2) for _ in range(400)], [generator.randint(3, 30) for _ in range(400)]
    plain, wide = (
        bootstrap.ratio_interval(values, weights, SETTINGS),
        bootstrap.difference_interval(values, weights, SETTINGS),
    )
    assert wide.low == pytest.approx(plain.low, abs=0.1 * (plain.high - plain.low))
    assert wide.high == pytest.approx(plain.high, abs=0.1 * (plain.high - plain.low))


def test_bounded_differences_that_are_all_0_still_have_a_width() -> None:
    interval = bootstrap.difference_interval([0.0] * 98, None, SETTINGS, bounded=True)
    assert interval.value == 0
    # A plain bootstrap would report 0 here.
    assert 0.015 < interval.high == pytest.approx(-interval.low, rel=0.1)


@pytest.mark.parametrize(("hits", "rows"), [(0, 12), (12, 12), (31, 59), (59, 59)])
def test_the_interval_of_a_share_is_wilsons(hits: int, rows: int) -> None:
    from scipy.stats import binomtest

    interval, expected = (
        stats.proportion_interval(hits, rows, confidence=0.95),
        binomtest(hits, rows).proportion_ci(method="wilson"),
    )
    assert interval.value == hits / rows
    assert interval.low == pytest.approx(expected.low, abs=1e-9)
    assert interval.high == pytest.approx(expected.high, abs=1e-9)


def test_the_interval_of_macro_f1_is_that_of_resampled_rows() -> None:
    generator = random.Random(9)
    answers = [generator.choice("abcd") for _ in range(60)]
    predicted = [a if generator.random() < 0.7 else generator.choice("abcd") for a in answers]
    resampled = []
    for _ in range(4000):
        rows = generator.choices(range(60), k=60)
        resampled.append(stats.macro_f1([answers[i] for i in rows], [predicted[i] for i in rows]))
    resampled.sort()

    interval = bootstrap.macro_f1_interval(answers, predicted, SETTINGS)
    assert interval.value == stats.macro_f1(answers, predicted)
    assert interval.low == pytest.approx(resampled[100], abs=0.015)
    assert interval.high == pytest.approx(resampled[3899], abs=0.015)

    assert bootstrap.macro_f1_interval(answers, answers, SETTINGS) == stats.Interval(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap.macro_f1_interval([], [], SETTINGS)


def test_an_end_that_the_resamples_cannot_resolve_is_not_nearer_than_students_t() -> None:
    """For one of 80 slices, fewer than one of 2,000 resamples lies beyond an end."""
    from scipy.stats import t

    generator, confidence = random.Random(11), 1 - 0.05 / 80
    values = [generator.gauss(0.0, 1.0) for _ in range(400)]
    reach = t.ppf((1 + confidence) / 2, 399) * statistics.stdev(values) / 20
    # Without Student's t the end would be the farthest resample, which differs from seed to seed.
    for seed in range(8):
        interval = bootstrap.difference_interval(values, None, BootstrapSettings(confidence, samples=2000, seed=seed))
        assert interval.low <= statistics.fmean(values) - 0.999 * reach
        assert interval.high >= statistics.fmean(values) + 0.999 * reach
        assert interval.high - interval.low < 2.6 * reach
