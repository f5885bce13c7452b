"""Compute score intervals of proportions, McNemar's test and macro-F1.

These are pure functions of the answers. Comparisons are paired, because the contestants answered the same rows. Rows of
one prompt are not independent of each other, so `prompts` names the prompt of each row (`clusters`). What has no such
form is in `bootstrap`. `benchmarks/RESULTS.md` holds the measured rates of false passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qlora_retrain.evaluation import clusters

# Halvings of [-1, 1], after which doubles cannot be halved further.
_BISECTION_STEPS = 60


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def negated(self) -> Interval:
        """The interval of the negated value: a gain seen as a loss."""
        # 0.0 - x and not -x, because -0.0 would be printed as "-0".
        return Interval(0.0 - self.value, 0.0 - self.high, 0.0 - self.low)


def paired_proportion_interval(
    first: Sequence[bool], second: Sequence[bool], *, confidence: float, prompts: Sequence[str] | None = None
) -> Interval:
    """Compute the score interval of the difference of two contestants' shares of right answers on the same rows.

    This is Tango's interval (Statistics in Medicine 17, 1998, 891-908). It inverts McNemar's test: at a difference of
    0 its statistic is McNemar's. It has a width even where both contestants answer every row alike: then it
    reaches z^2 / (n + z^2) to either side for n rows, where a bootstrap would report 0.

    Where prompts have several rows, all counts are divided by the design effect (`clusters.design_effect`), as Rao and
    Scott do (Biometrics 48, 1992, 577-585). So n is the number of independent rows that tell as much.

    Args:
        first: Whether the first contestant's answer to each row is right.
        second: The same of the second contestant.
        confidence: The probability that the interval covers the true difference.
        prompts: The prompt of each row; None: each row has its own.

    Raises:
        ValueError: If there are no rows.
    """
    if not first:
        raise ValueError("an interval needs at least one row")
    # Only the number of the rows on which both agree matters.
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    only_first, only_second = differences.count(1), differences.count(-1)
    effect = clusters.design_effect(differences, prompts, extremes=(-1.0, 1.0))
    counts = only_first / effect, only_second / effect, len(differences) / effect
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    # The score falls as the assumed difference grows, so bisection finds the difference with the target score.
    def solve(target_score: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(_BISECTION_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if _tango_score(*counts, middle) > target_score else (low, middle)
        return (low + high) / 2

    # Rounding must not put the value outside its own interval.
    value = (only_first - only_second) / len(differences)
    return Interval(value, min(value, solve(z)), max(value, solve(-z)))


def proportion_interval(hits: int, rows: int, *, confidence: float, design_effect: float = 1.0) -> Interval:
    """Compute a share with its score interval (Wilson 1927), which has a width even for 0 hits or all hits.

    Where prompts have several rows, the number of rows is divided by the design effect. Of seven such intervals this
    was among the two best (Franco, Little, Louis and Slud, J. Survey Statistics and Methodology 7, 2019, 334-364).

    Args:
        hits: The number of rows that are counted.
        rows: The number of all rows.
        confidence: The probability that the interval covers the true share.
        design_effect: How much less the rows tell than as many independent ones (`clusters.design_effect`).

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("an interval needs at least one row")
    z, share, size = NormalDist().inv_cdf((1 + confidence) / 2), hits / rows, rows / design_effect
    # The centre of the interval is not the measured share but lies nearer to 1/2.
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    reach = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return Interval(share, min(share, centre - reach), max(share, centre + reach))


def smallest_excludable_loss(rows: float, confidence: float) -> float:
    """Return the smallest loss of accuracy that so many rows can rule out, which needs equal answers to all of them.

    Args:
        rows: The number of independent rows: that of all rows / `clusters.mean_prompt_rows`.
        confidence: The confidence of the interval.
    """
    # This is the end of `paired_proportion_interval` where both contestants answer every row alike.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return z * z / (rows + z * z)


def mcnemar_p_value(first: Sequence[bool], second: Sequence[bool], prompts: Sequence[str] | None = None) -> float:
    """Compute the two-sided exact p-value of the hypothesis that two contestants are right equally often.

    Only prompts on which one contestant has more right answers carry information. If both are equally good, it is a
    fair coin which of the two that is. So all signs of the prompts' differences are equally likely (Fisher's
    randomization test). Its normal approximation is Obuchowski's test for clustered pairs (Statistics in Medicine 17,
    1998, 1495-1507). With one row a prompt it is McNemar's test (1947) in the exact binomial form.
    """
    differences = clusters.sum_by_prompt([int(a) - int(b) for a, b in zip(first, second, strict=True)], prompts)
    only_first, only_second = (sum(max(0, sign * d) for d in differences) for sign in (1, -1))
    sizes, fewer = [abs(d) for d in differences if d], min(only_first, only_second)
    if not sizes:
        return 1.0
    # Two-sided: twice the probability that the one side has at most `fewer`.
    return min(1.0, 2 * (_binomial_tail(len(sizes), fewer) if max(sizes) == 1 else _coins_tail(sizes, fewer)))


def macro_f1(answers: Sequence[str], predicted: Sequence[str]) -> float:
    """Average 2 * hits / (answers + predictions) over every label that is answered or predicted."""
    pairs = list(zip(answers, predicted, strict=True))
    labels = sorted({label for pair in pairs for label in pair})
    scores = []
    for label in labels:
        hits = sum(a == p == label for a, p in pairs)
        scores.append(2 * hits / (sum(a == label for a, _ in pairs) + sum(p == label for _, p in pairs)))
    return math.fsum(scores) / len(scores) if scores else 0.0


def _tango_score(only_first: float, only_second: float, rows: float, difference: float) -> float:
    """Compute Tango's score statistic of a difference (his equation 5)."""
    # `share` is the likeliest share of `only_second` under that difference: the root of a quadratic equation.
    a = 2 * rows
    b = (2 * rows - only_first + only_second) * difference - only_first - only_second
    c = -only_second * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)

    excess = only_first - only_second - rows * difference
    variance = rows * (2 * share + difference * (1 - difference))
    return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0


def _binomial_tail(coins: int, most: int) -> float:
    """Return the probability of at most `most` heads."""
    # Computed in logarithms, because 2**-coins is 0.0 from 1,075 coins on.
    log_terms = [_log_binomial(coins, k) - coins * math.log(2) for k in range(most + 1)]
    return math.fsum(math.exp(value) for value in log_terms)


def _coins_tail(values: Sequence[int], most: int) -> float:
    """Return the probability that the coins that show heads, of these values, are worth at most `most` together."""
    import numpy as np

    # The probability of each sum up to `most`; larger ones are left out.
    probabilities = np.zeros(most + 1)
    probabilities[0] = 1.0
    for value in values:
        heads = probabilities[: max(0, most + 1 - value)].copy()
        probabilities[value:] += heads
        probabilities /= 2
    return float(probabilities.sum())


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
