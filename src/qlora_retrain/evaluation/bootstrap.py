"""Compute bootstrap confidence intervals: of ratios, of paired differences, and of macro-F1.

Every resample draws whole prompts with all their rows, because the rows of one prompt are not independent: a cluster
bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). It never draws one
contestant's answers alone, because the contestants answered the same rows. The same seed gives the same interval.
`benchmarks/RESULTS.md` holds the measured rates of false passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain.evaluation import clusters
from qlora_retrain.evaluation.stats import Interval, macro_f1

if TYPE_CHECKING:
    from qlora_retrain.config.evaluate import EvaluateConfig

# Indices of resamples that are in memory at a time: 32 MB.
_MAX_INDICES_AT_ONCE = 4_000_000
# Resamples beyond an interval's end. With fewer, single draws determine the end.
_MIN_DRAWS_BEYOND = 5
# How much a skewed sample narrows a tail. Chosen from 2, 4, 6 and 8 by simulation; see docs/adr/0016.
_SKEWNESS_FACTOR = 6.0


@dataclass(frozen=True, slots=True)
class BootstrapSettings:
    """The settings of a bootstrap interval.

    Attributes:
        confidence: The probability that the interval covers the true value, e.g. 0.95.
        samples: The number of resamples.
        seed: The seed of the resampling.
    """

    confidence: float
    samples: int
    seed: int

    @classmethod
    def from_config(cls, settings: EvaluateConfig, confidence: float | None = None) -> BootstrapSettings:
        """Take the line's settings; `confidence`, where given, replaces theirs."""
        confidence = settings.confidence if confidence is None else confidence
        return cls(confidence, settings.bootstrap_samples, settings.seed)


def ratio_interval(
    numerators: Sequence[float],
    weights: Sequence[float] | None,
    bootstrap: BootstrapSettings,
    prompts: Sequence[str] | None = None,
) -> Interval:
    """Compute the bootstrap interval of sum(numerators) / sum(weights), with prompts drawn with replacement.

    It is the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). A mean
    over tokens is a ratio of two sums over rows: long rows weigh more, and resampling changes both sums. For two
    contestants, pass the differences of their rows (paired bootstrap; Koehn, EMNLP 2004, W04-3250).

    Args:
        numerators: One number per row: a loss in nats, 0 or 1 for an answer, or a difference of two of them.
        weights: The tokens of each row; None: every row weighs 1.
        bootstrap: The settings of the resampling.
        prompts: The prompt of each row; None: each row has its own.

    Raises:
        ValueError: If there are no rows or no weight.
    """
    import numpy as np

    top, bottom = _sums_by_prompt(numerators, weights, prompts)
    # A ratio of sums and not a mean of ratios, because a long row has more tokens.
    ratios = np.concatenate([t.sum(axis=1) / b.sum(axis=1) for t, b in _resample(top, bottom, bootstrap)])
    low, high = np.quantile(ratios, _tail_probabilities(bootstrap.confidence))
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def difference_interval(
    differences: Sequence[float],
    weights: Sequence[float] | None,
    bootstrap: BootstrapSettings,
    *,
    prompts: Sequence[str] | None = None,
    bounded: bool = False,
) -> Interval:
    """Compute the interval of a paired difference that a rule checks: at each end the wider of two bootstraps.

    The percentile interval is too short where a few prompts cause most of the difference; it then passes challengers
    that it should refuse. The studentized interval (bootstrap-t; Efron and Tibshirani 1993, chapter 12) is accurate
    to the second order. It is still too short for small, skewed samples.

    On the side of the long tail the studentized interval therefore uses a smaller tail probability than `confidence`
    implies: tail / (1 + 6 g / sqrt(n)). Here g is the skewness of the n prompts. The ratio g / sqrt(n) stays below 1
    and approaches it where a single prompt causes everything. This is a calibrated level (Loh, JASA 82, 1987, 155-162).

    For one of 80 slices the tail probability is 1 in 3,200, and of 2,000 draws at most one is expected beyond that.
    Where fewer than 5 draws lie beyond an end, that end is at least as far out as Student's t puts it.

    Args:
        differences: One number per row, like the numerators of `ratio_interval`.
        weights: The tokens of each row; None: every row weighs 1.
        bootstrap: The settings of the resampling.
        prompts: The prompt of each row; None: each row has its own.
        bounded: Whether the differences lie in [-1, 1] per token, where most may be 0. One prompt is then added at
            each extreme, of average squared size and with one token per row. Without them, rows that are all alike
            would give an interval of width 0 (Agresti and Min 2005 do the same for proportions).

    Raises:
        ValueError: If there are no rows or no weight.
    """
    import numpy as np

    top, bottom = _sums_by_prompt(differences, weights, prompts)
    value = float(top.sum() / bottom.sum())
    if bounded:
        # The two prompts cancel, but they give the sample a width.
        rows = math.sqrt(clusters.mean_squared_size(prompts))
        top, bottom = np.append(top, [rows, -rows]), np.append(bottom, [rows, rows])
    # `centre` includes these prompts and is what the resamples vary around; `value` is what was measured.
    centre = top.sum() / bottom.sum()
    error = float(_standard_error(top, bottom, centre))

    ratio_chunks, pivot_chunks = [], []
    for t, b in _resample(top, bottom, bootstrap):
        ratio = t.sum(axis=1) / b.sum(axis=1)
        ratio_chunks.append(ratio)
        errors = _standard_error(t, b, ratio[:, None])
        # A resample of prompts that are all alike has a standard error of 0, hence no studentized value.
        pivot_chunks.append((ratio - centre)[errors > 0] / errors[errors > 0])
    low, high = np.quantile(np.concatenate(ratio_chunks), _tail_probabilities(bootstrap.confidence))
    pivots = np.concatenate(pivot_chunks)

    if error > 0 and len(pivots):
        lowest, highest = _pivot_quantiles(pivots, _scaled_skewness(top, bottom, centre), bottom, bootstrap)
        # Bootstrap-t swaps the tails: a high pivot means that the resample overshot, so the true value lies lower.
        low, high = min(low, centre - highest * error), max(high, centre - lowest * error)

    # The measured value differs from `centre`, so it could lie outside.
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _pivot_quantiles(pivots: Any, skewness: float, weights: Any, bootstrap: BootstrapSettings) -> tuple[float, float]:
    """Return the quantiles of the studentized values for both ends, widened on the side of the long tail."""
    import numpy as np

    tail = _tail_probabilities(bootstrap.confidence)[0]
    # Only the side of the long tail is moved: the other side divides by 1.
    below, above = (tail / (1 + _SKEWNESS_FACTOR * max(0.0, side)) for side in (skewness, -skewness))
    lowest, highest = np.quantile(pivots, [below, 1 - above])

    # The draws cannot resolve a quantile with fewer than 5 of them beyond it.
    if below * bootstrap.samples < _MIN_DRAWS_BEYOND:
        lowest = min(lowest, -_student_t_quantile(below, weights))
    if above * bootstrap.samples < _MIN_DRAWS_BEYOND:
        highest = max(highest, _student_t_quantile(above, weights))
    return lowest, highest


def macro_f1_interval(
    answers: Sequence[str],
    predicted: Sequence[str],
    bootstrap: BootstrapSettings,
    prompts: Sequence[str] | None = None,
) -> Interval:
    """Compute macro-F1 with its percentile bootstrap interval, drawing prompts as `ratio_interval` does.

    Each resample averages over the labels that occur in it, as macro-F1 does over those in the data. A mean of ratios
    is biased for few rows, so the interval is widened to include the measured value where it would miss it.

    Raises:
        ValueError: If there are no rows.
    """
    import numpy as np

    value, labels = macro_f1(answers, predicted), np.asarray(sorted({*answers, *predicted}))
    is_answer, is_predicted = (np.asarray(names)[:, None] == labels for names in (answers, predicted))
    hits, occurrences = (is_answer & is_predicted).astype(np.float64), is_answer.astype(np.float64) + is_predicted
    # hits, occurrences: (rows, labels)
    if prompts is not None:
        numbers = np.asarray(clusters.prompt_numbers(prompts))
        sums = np.zeros((2, numbers.max(initial=-1) + 1, len(labels)))
        np.add.at(sums, (slice(None), numbers), np.stack([hits, occurrences]))
        hits, occurrences = sums  # (prompts, labels)

    # The resampled "values" are the prompts' numbers themselves, so that the draws are those of the other intervals.
    prompt_numbers, _ = _sums_by_prompt(range(len(hits)), None, None)
    scores = []
    for draws, _ in _resample(prompt_numbers, np.ones_like(prompt_numbers), bootstrap):
        flat_index = draws.astype(np.int64) + len(prompt_numbers) * np.arange(len(draws))[:, None]
        counts = np.bincount(flat_index.ravel(), minlength=draws.size).reshape(draws.shape)  # (draws, prompts)
        top, bottom = 2 * counts @ hits, counts @ occurrences  # (draws, labels)
        # A label that does not occur in a resample has no score there, so it is left out of that mean.
        scores.append((top / np.maximum(bottom, 1)).sum(axis=1) / (bottom > 0).sum(axis=1))

    low, high = np.quantile(np.concatenate(scores), _tail_probabilities(bootstrap.confidence))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _sums_by_prompt(
    numerators: Sequence[float], weights: Sequence[float] | None, prompts: Sequence[str] | None
) -> tuple[Any, Any]:
    """Return the sum of the numerators and of the weights over the rows of each prompt, both (prompts,)."""
    import numpy as np

    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(top) or bottom.sum() <= 0:
        raise ValueError("an interval needs at least one row with at least one token")
    if prompts is None:
        return top, bottom
    numbers = clusters.prompt_numbers(prompts)
    return np.bincount(numbers, top), np.bincount(numbers, bottom)


def _resample(top: Any, bottom: Any, bootstrap: BootstrapSettings) -> Iterator[tuple[Any, Any]]:
    """Draw prompts with replacement; yield (draws, prompts) of both arrays, chunk by chunk."""
    import numpy as np

    # All chunks draw from one generator, so the size of a chunk does not change the result.
    generator = np.random.default_rng(bootstrap.seed)
    draws_at_once = max(1, _MAX_INDICES_AT_ONCE // len(top))
    for start in range(0, bootstrap.samples, draws_at_once):
        indices = generator.integers(0, len(top), size=(min(draws_at_once, bootstrap.samples - start), len(top)))
        # A resample of prompts without tokens alone has no ratio.
        has_tokens = bottom[indices].sum(axis=1) > 0
        yield top[indices[has_tokens]], bottom[indices[has_tokens]]


def _standard_error(top: Any, bottom: Any, ratio: Any) -> Any:
    """Compute the standard error of sum(top) / sum(bottom) over the last axis, by the delta method."""
    import numpy as np

    n = top.shape[-1]
    # The residuals sum to 0, so no mean is subtracted before they are squared.
    squares = ((top - ratio * bottom) ** 2).sum(axis=-1)
    return np.sqrt(squares * n / max(1, n - 1)) / bottom.sum(axis=-1)


def _student_t_quantile(tail: float, weights: Any) -> float:
    """Return the quantile of Student's t above which a probability of `tail` lies.

    The degrees of freedom are those of the number of equal prompts with the same information (Kish's effective size).
    """
    from scipy.special import stdtrit

    degrees_of_freedom = max(1.0, float(weights.sum() ** 2 / (weights**2).sum()) - 1)
    return float(-stdtrit(degrees_of_freedom, tail))


def _scaled_skewness(top: Any, bottom: Any, ratio: float) -> float:
    """Return g / sqrt(n) in (-1, 1): the skewness g of the n prompts' contributions to sum(top) / sum(bottom)."""
    contributions = top - ratio * bottom
    return float((contributions**3).sum() / (contributions**2).sum() ** 1.5)


def _tail_probabilities(confidence: float) -> list[float]:
    tail = (1 - confidence) / 2
    return [tail, 1 - tail]
