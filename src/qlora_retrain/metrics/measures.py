"""A contestant's numbers over all rows of a suite, with their intervals, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain import stats
from qlora_retrain.config.judging import EvaluateConfig
from qlora_retrain.rows import RowScore
from qlora_retrain.rules.comparison import Scores, known, level, suite
from qlora_retrain.rules.rule import shown, span

Numbers = dict[str, float | None]
_TITLES = {
    "loss": "loss, nats a token",
    "macro_f1": "macro-F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "json_validity": "JSON validity",
    "kl": "KL from live, nats a token",
    "agreement": "tokens chosen as live",
}


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
    found["perplexity"] = math.exp(min(loss.value, 700.0))
    labelled = [s for s in rows if s.predicted is not None]
    if labelled:
        found |= _level(rows, "accuracy", settings)
        found["macro_f1"] = stats.macro_f1([answers[s.id] for s in labelled], [str(s.predicted) for s in labelled])
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


def table(measured: Mapping[str, Mapping[str, float | None]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of contestants against metrics for the report: what any of them has."""
    names = [key for numbers in measured.values() for key in numbers if not key.endswith(("_low", "_high"))]
    columns = [name for name in dict.fromkeys(names) if name != "rows"] + ["rows"]
    rows = [
        [contestant, *(f"{shown(n.get(c))} {span(n.get(f'{c}_low'), n.get(f'{c}_high'))}".strip() for c in columns)]
        for contestant, n in measured.items()
    ]
    return ["contestant", *map(title, columns)], rows


def title(metric: str) -> str:
    """A metric's name over its column."""
    return _TITLES.get(metric, metric.replace("_", " "))


def _level(rows: Sequence[RowScore], metric: str, settings: EvaluateConfig) -> Numbers:
    if not any(known(row, metric) for row in rows):
        return {}
    found = level(rows, metric, settings)
    return {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
