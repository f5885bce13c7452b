"""Two contestants on the same rows: how much better one is, and how sure that is.

Everything is said as a gain: above 0 the challenger is better, whatever the metric. Shares of right answers are
compared by McNemar's test and its interval (`stats.paired_proportions`), all else by the paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import stats
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.stats import Interval

Metric = str  # `accuracy`, `loss`, `token_accuracy`, or a name of `RowScore.values`
Scores = Mapping[str, Sequence[RowScore]]  # by contestant: the same rows in the same order
_UNITS = {"loss": "nats a token", "macro_f1": "macro-F1", "rouge_l": "ROUGE-L", "chrf": "chrF",
          "json_validity": "JSON validity"}  # fmt: skip
YES_OR_NO = ("accuracy", "exact_match", "json_validity")  # of one row: right or wrong


def metric_of(scores: Scores, settings: EvaluateConfig | None = None) -> Metric:
    """What contestants are compared by: the line's `primary`; else accuracy for labels, loss for all other tasks."""
    if settings is not None and settings.primary is not None:
        return settings.primary
    return "accuracy" if any(s.correct is not None for s in scores["challenger"]) else "loss"


def unit(metric: Metric) -> str:
    """The metric's name in a sentence."""
    return _UNITS.get(metric, metric.replace("_", " "))


def suite(rows: Sequence[RowScore], name: str) -> list[RowScore]:
    """The rows of a suite."""
    return [s for s in rows if s.suite == name]


def paired(ours: Sequence[RowScore], theirs: Sequence[RowScore], name: str) -> tuple[list[RowScore], list[RowScore]]:
    """The rows of a suite that two contestants were scored on.

    Raises:
        ValueError: If they are not the same rows.
    """
    first, second = suite(ours, name), suite(theirs, name)
    if [s.id for s in first] != [s.id for s in second]:
        raise ValueError(f"contestants were scored on different {name} rows: {len(first)} and {len(second)}")
    return first, second


def known(row: RowScore, metric: Metric) -> bool:
    """Whether the metric says something of the row: of tokens, where any was judged."""
    if metric in ("loss", "token_accuracy"):
        return row.tokens > 0 and (metric == "loss" or row.hits is not None)
    return row.correct is not None if metric == "accuracy" else metric in row.values


def value(row: RowScore, metric: Metric) -> float:
    """A row's number where it is the mean over rows that counts: higher is better."""
    return float(bool(row.correct)) if metric == "accuracy" else row.values[metric]


def gain(
    scores: Scores,
    over: str,
    name: str,
    metric: Metric,
    settings: EvaluateConfig,
    *,
    within: Collection[str] | None = None,
    confidence: float | None = None,
) -> Interval:
    """How much better the challenger is than another contestant on a suite, paired by row; above 0 is better.

    Args:
        scores: Of both.
        over: The other contestant.
        name: The suite.
        metric: What is compared.
        settings: For the intervals.
        within: The ids of the suite's rows that count; None: all.
        confidence: Of the interval; None: the settings'.

    Raises:
        ValueError: If they were scored on different rows, or the metric is known of none.
    """
    ours, theirs = paired(scores["challenger"], scores[over], name)
    pairs = [
        (a, b) for a, b in zip(ours, theirs, strict=True) if known(a, metric) and (within is None or a.id in within)
    ]
    sure = settings.confidence if confidence is None else confidence
    if metric in YES_OR_NO:
        return stats.paired_proportions(
            [value(a, metric) > 0 for a, _ in pairs], [value(b, metric) > 0 for _, b in pairs], confidence=sure
        )
    weights: list[float] | None = None
    if metric == "loss":
        # One denominator for both: where tokenizers differ, a loss per own token would compare different units.
        differences, weights = [b.loss_nats - a.loss_nats for a, b in pairs], [a.tokens for a, _ in pairs]
    elif metric == "token_accuracy":
        differences, weights = [float((a.hits or 0) - (b.hits or 0)) for a, b in pairs], [a.tokens for a, _ in pairs]
    else:
        differences = [value(a, metric) - value(b, metric) for a, b in pairs]
    return stats.difference_interval(
        differences,
        weights,
        confidence=sure,
        samples=settings.bootstrap_samples,
        seed=settings.seed,
        bounded=metric != "loss",
    )


def level(rows: Sequence[RowScore], metric: Metric, settings: EvaluateConfig) -> Interval:
    """A contestant's own value of a metric that is a mean over rows, with its interval.

    Raises:
        ValueError: If the metric is known of no row.
    """
    values = [value(row, metric) for row in rows if known(row, metric)]
    if metric in YES_OR_NO:
        return stats.proportion(sum(x > 0 for x in values), len(values), confidence=settings.confidence)
    return stats.ratio_interval(
        values, None, confidence=settings.confidence, samples=settings.bootstrap_samples, seed=settings.seed
    )
