"""Compare two contestants on the same rows: how much better one of them is, and how certain that is.

Every comparison is a gain: above 0 the challenger is better, whatever the metric. Shares of right answers use the
interval of McNemar's test (`stats.paired_proportion_interval`); every other metric uses the paired bootstrap. Either
counts prompts, since the rows of one prompt are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import bootstrap, clusters, stats
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.rows import RowScore, count_prompts
from qlora_retrain.evaluation.stats import Interval

Metric = str  # `accuracy`, `loss`, `token_accuracy`, or a name in `RowScore.values`
Scores = Mapping[str, Sequence[RowScore]]  # by contestant: the same rows in the same order
_DISPLAY_NAMES = {"loss": "nats per token", "macro_f1": "macro-F1", "rouge_l": "ROUGE-L", "chrf": "chrF",
                  "json_validity": "JSON validity"}  # fmt: skip
# Each row is right or wrong.
BINARY_METRICS = ("accuracy", "exact_match", "json_validity", "tool_call_match", "answers_ended")


def primary_metric(scores: Scores, settings: EvaluateConfig | None = None) -> Metric:
    """Return the metric that contestants are compared by.

    It is the line's `primary_metric`. Where that is not set, it is accuracy for label tasks and loss for all others.
    """
    if settings is not None and settings.primary_metric is not None:
        return settings.primary_metric
    # Only label tasks set `correct`.
    return "accuracy" if any(s.correct is not None for s in scores["challenger"]) else "loss"


def display_name(metric: Metric) -> str:
    """Return the metric's name as sentences and tables show it."""
    return _DISPLAY_NAMES.get(metric, metric.replace("_", " "))


def rows_of_suite(rows: Sequence[RowScore], suite: str) -> list[RowScore]:
    """Select the rows of one suite."""
    return [row for row in rows if row.suite == suite]


def pair_rows(
    ours: Sequence[RowScore], theirs: Sequence[RowScore], suite: str
) -> tuple[list[RowScore], list[RowScore]]:
    """Select the rows of a suite from the scores of two contestants.

    Raises:
        ValueError: If they were not scored on the same rows.
    """
    first, second = rows_of_suite(ours, suite), rows_of_suite(theirs, suite)
    if [s.id for s in first] != [s.id for s in second]:
        raise ValueError(f"contestants were scored on different {suite} rows: {len(first)} and {len(second)}")
    return first, second


def has_metric(row: RowScore, metric: Metric) -> bool:
    """Return whether the metric is defined for the row; a metric of tokens needs at least one scored token."""
    # Hits are counted on reference text only.
    if metric in ("loss", "token_accuracy"):
        return row.tokens > 0 and (metric == "loss" or row.hits is not None)
    return row.correct is not None if metric == "accuracy" else metric in row.values


def count_rows_with_metric(scores: Scores, suite: str, metric: Metric) -> int:
    """Count the rows of a suite for which the metric is defined."""
    return sum(has_metric(row, metric) for row in rows_of_suite(scores["challenger"], suite))


def count_prompts_with_metric(scores: Scores, suite: str, metric: Metric) -> int:
    """Count the different prompts among these rows."""
    return count_prompts(row for row in rows_of_suite(scores["challenger"], suite) if has_metric(row, metric))


def metric_value(row: RowScore, metric: Metric) -> float:
    """Return a row's value of a metric that is a plain mean over rows; higher is better."""
    return float(bool(row.correct)) if metric == "accuracy" else row.values[metric]


def gain_interval(
    scores: Scores,
    rival: str,
    suite: str,
    metric: Metric,
    settings: EvaluateConfig,
    *,
    row_ids: Collection[str] | None = None,
    confidence: float | None = None,
) -> Interval:
    """Compute how much better the challenger is than another contestant on a suite; above 0 it is better.

    Args:
        scores: The scores of both.
        rival: The other contestant.
        suite: The suite whose rows are compared.
        metric: The metric that is compared.
        settings: The settings of the intervals.
        row_ids: The ids of the rows to compare; None: all rows of the suite.
        confidence: The confidence of the interval; None: that of the settings.

    Raises:
        ValueError: If they were scored on different rows, or the metric is defined for no row.
    """
    pairs = [(a, b) for a, b in comparable_pairs(scores, rival, suite, metric) if row_ids is None or a.id in row_ids]
    options, prompts = BootstrapSettings.from_config(settings, confidence), [a.prompt for a, _ in pairs]

    # Where both answer every row alike, a bootstrap has width 0 and would pass challengers that it should refuse.
    if metric in BINARY_METRICS:
        return stats.paired_proportion_interval(
            [metric_value(a, metric) > 0 for a, _ in pairs],
            [metric_value(b, metric) > 0 for _, b in pairs],
            confidence=options.confidence,
            prompts=prompts,
        )

    weights: list[float] | None = None
    if metric == "loss":
        # The rival minus the challenger, because a lower loss is better.
        # One denominator for both, because a loss per token has another unit with another tokenizer.
        differences, weights = [b.loss_nats - a.loss_nats for a, b in pairs], [a.tokens for a, _ in pairs]
    elif metric == "token_accuracy":
        differences, weights = [float((a.hits or 0) - (b.hits or 0)) for a, b in pairs], [a.tokens for a, _ in pairs]
    else:
        differences = [metric_value(a, metric) - metric_value(b, metric) for a, b in pairs]
    # Every metric but the loss lies in [0, 1], so its differences lie in [-1, 1].
    return bootstrap.difference_interval(differences, weights, options, prompts=prompts, bounded=metric != "loss")


def comparable_pairs(scores: Scores, rival: str, suite: str, metric: Metric) -> list[tuple[RowScore, RowScore]]:
    """Pair the rows for which both contestants have the metric.

    A published version's own chat template may refuse rows that the line's new template carries, e.g. with a system
    turn or with tools. Such a row has no tokens in its scores.

    Raises:
        ValueError: If they were not scored on the same rows.
    """
    ours, theirs = pair_rows(scores["challenger"], scores[rival], suite)
    return [(a, b) for a, b in zip(ours, theirs, strict=True) if has_metric(a, metric) and has_metric(b, metric)]


def metric_interval(rows: Sequence[RowScore], metric: Metric, settings: EvaluateConfig) -> Interval:
    """Compute a contestant's own value of a metric that is a mean over rows, with its interval.

    Raises:
        ValueError: If the metric is defined for no row.
    """
    measured = [row for row in rows if has_metric(row, metric)]
    values, prompts = [metric_value(row, metric) for row in measured], [row.prompt for row in measured]
    # A bootstrap of answers that are all right would have no width.
    if metric in BINARY_METRICS:
        return share_interval([x > 0 for x in values], prompts, settings)
    return bootstrap.ratio_interval(values, None, BootstrapSettings.from_config(settings), prompts)


def share_interval(hits: Sequence[bool], prompts: Sequence[str], settings: EvaluateConfig) -> Interval:
    """Compute the share of the rows that are hits, with its interval.

    Raises:
        ValueError: If there are no rows.
    """
    effect = clusters.design_effect([int(hit) for hit in hits], prompts, extremes=(0.0, 1.0))
    return stats.proportion_interval(sum(hits), len(hits), confidence=settings.confidence, design_effect=effect)
