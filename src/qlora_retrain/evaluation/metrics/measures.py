"""A contestant's numbers over all rows of a suite, with their intervals, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import html
from qlora_retrain.evaluation import stats
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules.comparison import Scores, known, level, suite, unit

Numbers = dict[str, float | None]
_TITLES = {
    "loss": "loss, nats a token",
    "cost": "nats a token lost against live",
    "kl": "KL from live, nats a token",
    "agreement": "tokens chosen as live",
}
_SHARES = ("accuracy", "exact_match", "json_validity", "field_accuracy", "token_accuracy", "agreement")
_DECIMALS = {"perplexity": 1, "kl": 5, "rows": 0}  # of others 4; fixed, to compare down a column


def measure(rows: Sequence[RowScore], settings: EvaluateConfig, answers: Mapping[str, str]) -> Numbers:
    """A contestant's numbers on one suite, with intervals; empty where there are no rows.

    Args:
        rows: Of one contestant and one suite.
        settings: For the metrics and the intervals.
        answers: The true answer of each row id, for macro-F1.
    """
    if not rows:
        return {}
    if not all(math.isfinite(s.loss_nats) for s in rows) or not sum(s.tokens for s in rows):
        return {"loss": None, "perplexity": None, "rows": len(rows)}
    how: dict[str, Any] = {
        "confidence": settings.confidence,
        "samples": settings.bootstrap_samples,
        "seed": settings.seed,
    }
    loss = stats.ratio_interval([s.loss_nats for s in rows], [s.tokens for s in rows], **how)
    found: Numbers = {"loss": loss.value, "loss_low": loss.low, "loss_high": loss.high}
    # A draw's perplexity is that of its loss, so the quantiles of both are the same draws'.
    found |= {name.replace("loss", "perplexity"): math.exp(min(value or 0.0, 700.0)) for name, value in found.items()}
    labelled = [s for s in rows if s.predicted is not None]
    if labelled:
        found |= _level(rows, "accuracy", settings)
        macro = stats.macro_f1_interval([answers[s.id] for s in labelled], [str(s.predicted) for s in labelled], **how)
        found |= {"macro_f1": macro.value, "macro_f1_low": macro.low, "macro_f1_high": macro.high}
    for name in settings.written_metrics:
        found |= _level(rows, name, settings)
    if any(s.hits is not None for s in rows):
        hits = stats.ratio_interval([s.hits or 0 for s in rows], [s.tokens for s in rows], **how)
        found |= {"token_accuracy": hits.value, "token_accuracy_low": hits.low, "token_accuracy_high": hits.high}
    return found | {"rows": len(rows)}


def measure_suite(
    scores: Scores, name: str, settings: EvaluateConfig, answers: Mapping[str, str]
) -> dict[str, Numbers]:
    """`measure` of every contestant that has rows in that suite."""
    found = {contestant: measure(suite(rows, name), settings, answers) for contestant, rows in scores.items()}
    return {contestant: numbers for contestant, numbers in found.items() if numbers}


def table(
    measured: Mapping[str, Mapping[str, float | None]], who: str = "contestant", columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of contestants against metrics for the report.

    Args:
        measured: The numbers of each.
        who: What they are called.
        columns: The metrics wanted, of which those are shown that any has; None: all, the number of rows last.
    """
    names = [key for numbers in measured.values() for key in numbers if not key.endswith(("_low", "_high"))]
    wanted = [*(name for name in names if name != "rows"), "rows"] if columns is None else columns
    shown = [c for c in dict.fromkeys(wanted) if any(numbers.get(c) is not None for numbers in measured.values())]
    rows = [[name, *(cell(numbers, column) for column in shown)] for name, numbers in measured.items()]
    return [who, *map(title, shown)], rows


def title(metric: str) -> str:
    """A metric's name over its column."""
    return _TITLES.get(metric, unit(metric))


def cell(numbers: Mapping[str, Any], metric: str) -> str:
    """A metric in a table, with its interval where it has one."""
    value, low, high = (numbers.get(name) for name in (metric, f"{metric}_low", f"{metric}_high"))
    if value is None:
        return ""
    form = ".1%" if metric in _SHARES else f",.{_DECIMALS.get(metric, 4)}f"
    return (
        format(value, form)
        if low is None or high is None
        else html.with_ends(format(value, form), f"{low:{form}} to {high:{form}}")
    )


def _level(rows: Sequence[RowScore], metric: str, settings: EvaluateConfig) -> Numbers:
    if not any(known(row, metric) for row in rows):
        return {}
    found = level(rows, metric, settings)
    return {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
