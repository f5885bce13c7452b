"""The content of `lab.json`: every number of a lab, from which its page is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import count_prompts
from qlora_retrain.evaluation.rules.comparison import Metric
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.lab.recommend import Recommendation
from qlora_retrain.lab.results import Candidate, interval_json, value_interval

# Of these the page shows the mean over the seeds.
MEANS = (
    "adapter_bytes",
    "trainable_parameters",
    "peak_memory_mib",
    "tokens_per_second",
    "training_seconds",
    "intruder_dimensions",
)
# Of these too; each has an interval of its own in every seed.
_INTERVAL_MEANS = ("forgetting_nats", "merge_loss_nats")


def summarise(
    facts: Mapping[str, Any],
    candidates: Sequence[Candidate],
    recommendation: Recommendation,
    metric: Metric,
    settings: EvaluateConfig,
    *,
    failed: Sequence[Mapping[str, Any]],
    skipped: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return the document.

    Args:
        facts: What was asked for, e.g. the line and the varied settings.
        candidates: The combinations that were measured, the best first.
        recommendation: Which of them to take.
        metric: The line's primary metric.
        settings: The settings of the intervals.
        failed: The runs that failed, with their exit codes and messages.
        skipped: The combinations that the line refuses, with the reasons.
    """
    best, first = candidates[0], candidates[0].results[0]
    return {
        "schema_version": 1,
        **facts,
        "metric": metric,
        "is_lower_better": metric == "loss",
        "confidence": settings.confidence,
        "judge_rows": len(first.scores),
        "judge_prompts": count_prompts(first.scores),
        "base": interval_json(value_interval(first.base_scores, metric, settings)),
        "recommendation": {
            "take": recommendation.take,
            "best": recommendation.best,
            "sentence": recommendation.sentence,
            "notes": list(recommendation.notes),
        },
        "points": [_point(candidate, metric, settings) for candidate in candidates],
        "comparisons_with": best.label,
        "comparisons": [comparison.as_json() for comparison in recommendation.comparisons],
        "failed": [dict(entry) for entry in failed],
        "skipped": [{"label": label, "reason": reason} for label, reason in skipped],
    }


def _point(candidate: Candidate, metric: Metric, settings: EvaluateConfig) -> dict[str, Any]:
    """Return a combination: its metric and loss over all seeds, the range of the seeds, the means, and every seed."""
    rows = candidate.scores(candidate.seeds)
    return {
        "label": candidate.label,
        "settings": candidate.settings,
        "metric": interval_json(value_interval(rows, metric, settings)),
        "metric_range": _range([result.numbers["metric"] for result in candidate.results]),
        "loss": interval_json(value_interval(rows, "loss", settings)),
        **{name: candidate.mean(name) for name in MEANS},
        **{name: _mean_value([r.numbers[name] for r in candidate.results]) for name in _INTERVAL_MEANS},
        "seeds": [result.numbers for result in candidate.results],
    }


def _range(intervals: Sequence[Mapping[str, float] | None]) -> list[float] | None:
    values = [interval["value"] for interval in intervals if interval is not None]
    return [min(values), max(values)] if values else None


def _mean_value(intervals: Sequence[Mapping[str, float] | Interval | None]) -> float | None:
    values = [interval["value"] for interval in intervals if isinstance(interval, Mapping)]
    return sum(values) / len(values) if values and len(values) == len(intervals) else None
