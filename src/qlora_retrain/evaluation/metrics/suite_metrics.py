"""Compute a contestant's metrics over all rows of a suite, with intervals, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import html
from qlora_retrain.evaluation import answer_endings, bootstrap
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.metrics.completion_metrics import selected_completion_metrics
from qlora_retrain.evaluation.rows import RowScore, count_prompts
from qlora_retrain.evaluation.rules.comparison import (
    Metric,
    Scores,
    display_name,
    has_metric,
    metric_interval,
    rows_of_suite,
)

# A metric by name, its ends as `<name>_low` and `<name>_high`, and the counts `prompts` and `rows`.
MetricValues = dict[str, float | None]
_TITLES = {
    "loss": "loss, nats per token",
    "cost": "nats per token lost against the unmerged model",
    "kl": "KL from the unmerged model, nats per token",
    "agreement": "tokens with the unmerged model's choice",
    "answers_ended": "answers that ended by themselves",
}
_PERCENTAGES = (
    "accuracy",
    "exact_match",
    "json_validity",
    "field_accuracy",
    "token_accuracy",
    "agreement",
    "tool_call_match",
    "answers_ended",
)
# Fixed decimals, so that the numbers of a column can be compared; all other metrics have 4.
_DECIMALS = {"perplexity": 1, "kl": 5, "prompts": 0, "rows": 0}
_COUNTS = ("prompts", "rows")
# exp() of a double overflows above 709.
_MAX_EXPONENT = 700.0


def compute_metrics(rows: Sequence[RowScore], settings: EvaluateConfig, answers: Mapping[str, str]) -> MetricValues:
    """Compute a contestant's metrics on one suite, with intervals; empty where there are no rows.

    Args:
        rows: The scores of one contestant on one suite.
        settings: The selection of metrics, and the settings of the intervals.
        answers: The true answer by row id, for macro-F1.
    """
    if not rows:
        return {}
    # One loss that is not finite makes every mean meaningless.
    if not all(math.isfinite(s.loss_nats) for s in rows) or not sum(s.tokens for s in rows):
        return {"loss": None, "perplexity": None, **_counts(rows)}

    # A row without tokens was not scored by this contestant.
    rows = [s for s in rows if s.tokens]
    options, prompts = BootstrapSettings.from_config(settings), [s.prompt for s in rows]
    loss = bootstrap.ratio_interval([s.loss_nats for s in rows], [s.tokens for s in rows], options, prompts)
    values: MetricValues = {"loss": loss.value, "loss_low": loss.low, "loss_high": loss.high}
    # exp() is monotonic, so the quantiles of the resampled perplexities are those of the resampled losses.
    values |= {
        name.replace("loss", "perplexity"): math.exp(min(value or 0.0, _MAX_EXPONENT)) for name, value in values.items()
    }

    predicted_rows = [s for s in rows if s.predicted is not None]
    if predicted_rows:
        values |= _mean_with_ends(rows, "accuracy", settings)
        macro_f1 = bootstrap.macro_f1_interval(
            [answers[s.id] for s in predicted_rows],
            [str(s.predicted) for s in predicted_rows],
            options,
            [s.prompt for s in predicted_rows],
        )
        values |= {"macro_f1": macro_f1.value, "macro_f1_low": macro_f1.low, "macro_f1_high": macro_f1.high}
    for name in (*selected_completion_metrics(settings), answer_endings.METRIC):
        values |= _mean_with_ends(rows, name, settings)

    # Hits are counted on reference text only.
    if any(s.hits is not None for s in rows):
        hits = bootstrap.ratio_interval([s.hits or 0 for s in rows], [s.tokens for s in rows], options, prompts)
        values |= {"token_accuracy": hits.value, "token_accuracy_low": hits.low, "token_accuracy_high": hits.high}
    return values | _counts(rows)


def _counts(rows: Sequence[RowScore]) -> MetricValues:
    return {"prompts": count_prompts(rows), "rows": len(rows)}


def compute_suite_metrics(
    scores: Scores, suite: str, settings: EvaluateConfig, answers: Mapping[str, str]
) -> dict[str, MetricValues]:
    """Apply `compute_metrics` to every contestant that has rows in that suite."""
    by_contestant = {
        contestant: compute_metrics(rows_of_suite(rows, suite), settings, answers)
        for contestant, rows in scores.items()
    }
    return {contestant: values for contestant, values in by_contestant.items() if values}


def metrics_table(
    metrics: Mapping[str, Mapping[str, float | None]],
    row_header: str = "contestant",
    columns: Sequence[str] | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of a table of contestants against metrics.

    Args:
        metrics: The metrics of each contestant.
        row_header: What a row stands for, e.g. `contestant` or `form`.
        columns: The metrics to show; those that no contestant has are left out. None: all metrics, then the numbers
            of prompts and rows.
    """
    # A metric's ends are shown in the cell of the metric itself.
    names = [key for values in metrics.values() for key in values if not key.endswith(("_low", "_high"))]
    requested = [*(name for name in names if name not in _COUNTS), *_COUNTS] if columns is None else columns
    visible = [c for c in dict.fromkeys(requested) if any(values.get(c) is not None for values in metrics.values())]
    rows = [[name, *(format_cell(values, column) for column in visible)] for name, values in metrics.items()]
    return [row_header, *map(column_title, visible)], rows


def column_title(metric: Metric) -> str:
    """Return the title of a metric's column."""
    return _TITLES.get(metric, display_name(metric))


def format_cell(values: Mapping[str, Any], metric: Metric) -> str:
    """Write a metric for a table, with its interval where it has one."""
    value, low, high = (values.get(name) for name in (metric, f"{metric}_low", f"{metric}_high"))
    if value is None:
        return ""
    number_format = ".1%" if metric in _PERCENTAGES else f",.{_DECIMALS.get(metric, 4)}f"
    if low is None or high is None:
        return format(value, number_format)
    return html.with_interval(format(value, number_format), f"{low:{number_format}} to {high:{number_format}}")


def _mean_with_ends(rows: Sequence[RowScore], metric: Metric, settings: EvaluateConfig) -> MetricValues:
    """Return a metric's mean and ends; empty where it is defined for no row."""
    if not any(has_metric(row, metric) for row in rows):
        return {}
    interval = metric_interval(rows, metric, settings)
    return {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
