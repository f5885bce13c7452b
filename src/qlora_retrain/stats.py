"""How sure a measured difference is: the paired bootstrap, McNemar's exact test and macro-F1.

Pure functions of numbers; the same seed gives the same interval. Everything is paired: the contestants answered the
same rows, so what is resampled is the row and never the contestant's answers apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_CELLS = 4_000_000  # row indices held at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def negative(self) -> Interval:
        """The same interval seen from the other side."""
        return Interval(-self.value, -self.high, -self.low)


def ratio_interval(
    numerators: Sequence[float], weights: Sequence[float] | None, *, confidence: float, samples: int, seed: int
) -> Interval:
    """The bootstrap interval of sum(numerators) / sum(weights), rows being drawn with replacement.

    The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13). A mean over tokens
    is a ratio of two sums over rows: long rows weigh more, and resampling rows moves both sums. For a difference of
    two contestants give the rows' differences (paired bootstrap; Koehn, EMNLP 2004, W04-3250).

    Args:
        numerators: One number a row: a loss in nats, 0 or 1 for an answer, or a difference of two such.
        weights: The row's tokens; None: every row weighs 1.
        confidence: E.g. 0.95.
        samples: How often the rows are drawn again.
        seed: Of the draws.

    Raises:
        ValueError: If there are no rows or no weight.
    """
    import numpy as np

    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(top) or bottom.sum() <= 0:
        raise ValueError("an interval needs at least one row with at least one token")
    draw = np.random.default_rng(seed)
    at_once = max(1, _CELLS // len(top))
    ratios = []
    for start in range(0, samples, at_once):
        rows = draw.integers(0, len(top), size=(min(at_once, samples - start), len(top)))
        # Rows without tokens may be drawn alone; such a draw says nothing.
        weight = bottom[rows].sum(axis=1)
        ratios.append(top[rows].sum(axis=1)[weight > 0] / weight[weight > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided exact p-value that two contestants are right equally often on the same rows.

    Only rows on which exactly one is right say anything; under equality each is a fair coin (McNemar 1947, the exact
    binomial form).
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    coins, fewer = only_first + only_second, min(only_first, only_second)
    if coins == 0:
        return 1.0
    # In logarithms, because 2**-coins is 0.0 from 1,075 coins on.
    logs = [_log_choose(coins, k) - coins * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def macro_f1(answers: Sequence[str], predicted: Sequence[str]) -> float:
    """The mean over labels of 2·hits / (answers + predictions), over every label that is answered or predicted."""
    pairs = list(zip(answers, predicted, strict=True))
    labels = sorted({label for pair in pairs for label in pair})
    scores = []
    for label in labels:
        hits = sum(a == p == label for a, p in pairs)
        scores.append(2 * hits / (sum(a == label for a, _ in pairs) + sum(p == label for _, p in pairs)))
    return math.fsum(scores) / len(scores) if scores else 0.0


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
