"""How sure a measured difference is: the paired bootstrap, McNemar's test and its interval, and macro-F1.

Pure functions of numbers; the same seed gives the same interval. Everything is paired: the contestants answered the
same rows, so what is resampled is the row and never the contestant's answers apart. `docs/verdict.md` has the rates of
false passes, measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

_CELLS = 4_000_000  # row indices held at a time: 32 MB
_HALVINGS = 60  # of [-1, 1], until floats end
_BEYOND = 5  # draws beyond an end: with fewer it is the luck of single draws
_SKEWED = 6.0  # how much a skewed sample narrows a tail; from simulation, see docs/adr/0016


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def negative(self) -> Interval:
        """The same interval seen from the other side."""
        return Interval(0.0 - self.value, 0.0 - self.high, 0.0 - self.low)  # 0.0 - x: never the zero that prints as -0


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

    top, bottom = _arrays(numerators, weights)
    ratios = np.concatenate([t.sum(axis=1) / b.sum(axis=1) for t, b in _draws(top, bottom, samples, seed)])
    low, high = np.quantile(ratios, _tails(confidence))
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def difference_interval(
    differences: Sequence[float],
    weights: Sequence[float] | None,
    *,
    confidence: float,
    samples: int,
    seed: int,
    bounded: bool = False,
) -> Interval:
    """The interval of a paired difference that a rule is held against: the wider of two bootstraps, end by end.

    The percentile interval is too short where a few rows make most of the difference, and then lets through what it
    should not. The studentized one (bootstrap-t; Efron and Tibshirani 1993, ch. 12) is right to the second order, but
    still too short in few rows of a skewed kind. So on the side of the long tail it is taken at a smaller probability
    than `confidence` says, tail / (1 + 6 g / sqrt(n)), where g is the skewness of the n rows and so g / sqrt(n) lies
    below 1, which it reaches where one row makes everything (a calibrated level; Loh, JASA 82, 1987, 155-162).

    Of one of 80 slices an end is asked for at a probability of 1 in 3,200, and 2,000 draws have nothing there but their
    farthest one or none. Where fewer than 5 draws lie beyond an end, it is not nearer than Student's t has it.

    Args:
        differences: One number a row, as `ratio_interval`'s numerators.
        weights: The row's tokens; None: every row weighs 1.
        confidence: E.g. 0.95.
        samples: How often the rows are drawn again.
        seed: Of the draws.
        bounded: The differences lie in [-1, 1] a token and most may be 0: a row of one token of each extreme is added,
            so that rows which happen to be all alike do not make an interval of no width (as Agresti and Min 2005 do
            for proportions).

    Raises:
        ValueError: If there are no rows or no weight.
    """
    import numpy as np

    top, bottom = _arrays(differences, weights)
    value = float(top.sum() / bottom.sum())
    if bounded:
        top, bottom = np.append(top, [1.0, -1.0]), np.append(bottom, [1.0, 1.0])
    centre = top.sum() / bottom.sum()
    error = float(_error(top, bottom, centre))
    ratios, scaled = [], []
    for t, b in _draws(top, bottom, samples, seed):
        ratio = t.sum(axis=1) / b.sum(axis=1)
        ratios.append(ratio)
        errors = _error(t, b, ratio[:, None])
        scaled.append((ratio - centre)[errors > 0] / errors[errors > 0])
    low, high = np.quantile(np.concatenate(ratios), _tails(confidence))
    pivots = np.concatenate(scaled)
    if error > 0 and len(pivots):
        tail, skewed = _tails(confidence)[0], _skewness(top, bottom, centre)
        below, above = (tail / (1 + _SKEWED * max(0.0, side)) for side in (skewed, -skewed))
        least, most = np.quantile(pivots, [below, 1 - above])
        if below * samples < _BEYOND:
            least = min(least, -_student(below, bottom))
        if above * samples < _BEYOND:
            most = max(most, _student(above, bottom))
        low, high = min(low, centre - most * error), max(high, centre - least * error)
    return Interval(value, min(value, float(low)), max(value, float(high)))


def paired_proportions(first: Sequence[bool], second: Sequence[bool], *, confidence: float) -> Interval:
    """The score interval of the difference of two contestants' shares of right answers on the same rows.

    Tango, Statistics in Medicine 17 (1998) 891-908: McNemar's test turned into an interval, since at a difference of 0
    its statistic is McNemar's. It keeps its width where no row tells the two apart: with n rows answered alike it is
    z^2 / (n + z^2) to either side, where a bootstrap says 0.

    Raises:
        ValueError: If there are no rows.
    """
    rows = len(first)
    if not rows:
        raise ValueError("an interval needs at least one row")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    def end(wanted: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if _tango(only_first, only_second, rows, middle) > wanted else (low, middle)
        return (low + high) / 2

    value = (only_first - only_second) / rows
    return Interval(value, min(value, end(z)), max(value, end(-z)))


def proportion(hits: int, rows: int, *, confidence: float) -> Interval:
    """A share with its score interval (Wilson 1927), which has a width also where all rows or none are hits.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("an interval needs at least one row")
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), hits / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    reach = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return Interval(share, min(share, centre - reach), max(share, centre + reach))


def smallest_excluded(rows: int, confidence: float) -> float:
    """The smallest loss of accuracy that `rows` rows can rule out, which they do when all are answered alike."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return z * z / (rows + z * z)


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


def macro_f1_interval(
    answers: Sequence[str], predicted: Sequence[str], *, confidence: float, samples: int, seed: int
) -> Interval:
    """Macro-F1 with its percentile bootstrap interval, the rows drawn as `ratio_interval` draws them.

    Over the labels that a draw holds, as macro-F1 itself is over those that the rows hold. A mean of ratios is biased
    in few rows, so the interval is widened to the measured value where it would not hold it.

    Raises:
        ValueError: If there are no rows.
    """
    import numpy as np

    value, labels = macro_f1(answers, predicted), np.asarray(sorted({*answers, *predicted}))
    given, said = (np.asarray(names)[:, None] == labels for names in (answers, predicted))
    hits, both = (given & said).astype(np.float64), given.astype(np.float64) + said  # (rows, labels)
    numbers, _ = _arrays(range(len(answers)), None)
    found = []
    for drawn, _ in _draws(numbers, np.ones_like(numbers), samples, seed):
        at = drawn.astype(np.int64) + len(numbers) * np.arange(len(drawn))[:, None]
        times = np.bincount(at.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often each row: (draws, rows)
        top, bottom = 2 * times @ hits, times @ both
        found.append((top / np.maximum(bottom, 1)).sum(axis=1) / (bottom > 0).sum(axis=1))
    low, high = np.quantile(np.concatenate(found), _tails(confidence))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _tango(only_first: int, only_second: int, rows: int, difference: float) -> float:
    """Tango's score statistic of a difference, under which `only_second`'s share is estimated (his equation 5)."""
    a = 2 * rows
    b = (2 * rows - only_first + only_second) * difference - only_first - only_second
    c = -only_second * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    above = only_first - only_second - rows * difference
    variance = rows * (2 * share + difference * (1 - difference))
    return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above) if above else 0.0


def _arrays(numerators: Sequence[float], weights: Sequence[float] | None) -> tuple[Any, Any]:
    import numpy as np

    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(top) or bottom.sum() <= 0:
        raise ValueError("an interval needs at least one row with at least one token")
    return top, bottom


def _draws(top: Any, bottom: Any, samples: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """The rows drawn again, (draws, rows) of each, a part at a time; rows without tokens drawn alone say nothing."""
    import numpy as np

    draw = np.random.default_rng(seed)
    at_once = max(1, _CELLS // len(top))
    for start in range(0, samples, at_once):
        rows = draw.integers(0, len(top), size=(min(at_once, samples - start), len(top)))
        told = bottom[rows].sum(axis=1) > 0
        yield top[rows[told]], bottom[rows[told]]


def _error(top: Any, bottom: Any, ratio: Any) -> Any:
    """The standard error of sum(top) / sum(bottom) over the last axis, by the delta method."""
    import numpy as np

    n = top.shape[-1]
    squares = ((top - ratio * bottom) ** 2).sum(axis=-1)
    return np.sqrt(squares * n / max(1, n - 1)) / bottom.sum(axis=-1)


def _student(tail: float, weights: Any) -> float:
    """The quantile of Student's t above which `tail` lies, with the degrees of freedom of so many even rows (Kish)."""
    from scipy.special import stdtrit

    freedom = max(1.0, float(weights.sum() ** 2 / (weights**2).sum()) - 1)
    return float(-stdtrit(freedom, tail))


def _skewness(top: Any, bottom: Any, ratio: float) -> float:
    """The skewness of what each row adds to sum(top) / sum(bottom), by the root of the rows: in (-1, 1)."""
    added = top - ratio * bottom
    return float((added**3).sum() / (added**2).sum() ** 1.5)


def _tails(confidence: float) -> list[float]:
    tail = (1 - confidence) / 2
    return [tail, 1 - tail]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
