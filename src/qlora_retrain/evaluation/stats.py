"""Compute score intervals of proportions, McNemar's test and macro-F1 in closed form.

These are pure functions of counts. Comparisons are paired, because the contestants answered the same rows. What has no
closed form is in `bootstrap`. `benchmarks/RESULTS.md` holds the measured rates of false passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

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


def paired_proportion_interval(first: Sequence[bool], second: Sequence[bool], *, confidence: float) -> Interval:
    """Compute the score interval of the difference of two contestants' shares of right answers on the same rows.

    This is Tango's interval (Statistics in Medicine 17, 1998, 891-908). It inverts McNemar's test: at a difference of
    0 its statistic is McNemar's. It has a width even where both contestants answer every row alike: then it
    reaches z^2 / (n + z^2) to either side for n rows, where a bootstrap would report 0.

    Raises:
        ValueError: If there are no rows.
    """
    rows = len(first)
    if not rows:
        raise ValueError("an interval needs at least one row")
    # Only the number of the rows on which both agree matters.
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    # The score falls as the assumed difference grows, so bisection finds the difference with the target score.
    def solve(target_score: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(_BISECTION_STEPS):
            middle = (low + high) / 2
            is_too_small = _tango_score(only_first, only_second, rows, middle) > target_score
            low, high = (middle, high) if is_too_small else (low, middle)
        return (low + high) / 2

    # Rounding must not put the value outside its own interval.
    value = (only_first - only_second) / rows
    return Interval(value, min(value, solve(z)), max(value, solve(-z)))


def proportion_interval(hits: int, rows: int, *, confidence: float) -> Interval:
    """Compute a share with its score interval (Wilson 1927), which has a width even for 0 hits or all hits.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("an interval needs at least one row")
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), hits / rows
    # The centre of the interval is not the measured share but lies nearer to 1/2.
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    reach = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return Interval(share, min(share, centre - reach), max(share, centre + reach))


def smallest_excludable_loss(rows: int, confidence: float) -> float:
    """Return the smallest loss of accuracy that `rows` rows can rule out, which needs equal answers to all of them."""
    # This is the end of `paired_proportion_interval` where both contestants answer every row alike.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return z * z / (rows + z * z)


def mcnemar_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Compute the two-sided exact p-value of the hypothesis that two contestants are right equally often.

    Only rows on which exactly one contestant is right carry information. If both are equally good, each such row is a
    fair coin (McNemar 1947, the exact binomial form).
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    # Two-sided: twice the probability of at most `fewer` heads.
    coins, fewer = only_first + only_second, min(only_first, only_second)
    if coins == 0:
        return 1.0

    # Computed in logarithms, because 2**-coins is 0.0 from 1,075 coins on.
    log_terms = [_log_binomial(coins, k) - coins * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in log_terms))


def macro_f1(answers: Sequence[str], predicted: Sequence[str]) -> float:
    """Average 2 * hits / (answers + predictions) over every label that is answered or predicted."""
    pairs = list(zip(answers, predicted, strict=True))
    labels = sorted({label for pair in pairs for label in pair})
    scores = []
    for label in labels:
        hits = sum(a == p == label for a, p in pairs)
        scores.append(2 * hits / (sum(a == label for a, _ in pairs) + sum(p == label for _, p in pairs)))
    return math.fsum(scores) / len(scores) if scores else 0.0


def _tango_score(only_first: int, only_second: int, rows: int, difference: float) -> float:
    """Compute Tango's score statistic of a difference (his equation 5)."""
    # `share` is the likeliest share of `only_second` under that difference: the root of a quadratic equation.
    a = 2 * rows
    b = (2 * rows - only_first + only_second) * difference - only_first - only_second
    c = -only_second * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)

    excess = only_first - only_second - rows * difference
    variance = rows * (2 * share + difference * (1 - difference))
    return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
