"""A run in two lines for the note that an orchestrator shows beside it: how it ended, and the two numbers that matter.

Those are the primary metric of the new model with its interval, and its difference to the champion, or to the base
where there is no champion. They are the evaluation's, whose document is verified against its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_retrain.core import graph
from qlora_retrain.pipeline import run_page, status
from qlora_retrain.pipeline.plan import Plan

# The model that the difference is with: the first of these that was compared.
_RIVALS = ("champion", "base")


def as_text(plan: Plan) -> str:
    """Return how the run ended, and the verdict's line where there is one.

    Raises:
        IntegrityError: If the evaluation's document differs from its manifest.
    """
    numbers = "" if status.nothing_to_do(plan) else verdict_line(plan)
    return "\n".join(filter(None, (run_page.sentence(plan), numbers)))


def verdict_line(plan: Plan) -> str:
    """Return the verdict with its two numbers; empty while the run has no evaluation.

    Raises:
        IntegrityError: If the evaluation's document differs from its manifest.
    """
    data = run_page.verified_file(plan, graph.producer_name("evaluation"), "evaluation.json")
    return "" if data is None else _line(json.loads(data))


def _line(evaluation: Mapping[str, Any]) -> str:
    from qlora_retrain.evaluation.rules.comparison import display_name

    metric = evaluation["metric"]
    values = evaluation["contestants"].get("challenger", {})
    parts = []
    if values.get(metric) is not None:
        parts.append(f"{display_name(metric)} {_interval(values, metric, f'{metric}_low', f'{metric}_high')}")
    if gain := _gain(evaluation["differences"]):
        difference = _interval(gain, "value", "low", "high", sign="+")
        parts.append(f"against the {gain['against']} {difference}, where above 0 is better")
    return "; ".join([f"Verdict: {evaluation['verdict']}", *parts]) + "."


def _gain(differences: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the difference on the evaluation rows to the first rival that was compared."""
    by_rival = {gain["against"]: gain for gain in differences if gain["suite"] == "eval"}
    return next((by_rival[rival] for rival in _RIVALS if rival in by_rival), None)


def _interval(values: Mapping[str, Any], middle: str, low: str, high: str, sign: str = "") -> str:
    text = f"{values[middle]:{sign}.4f}"
    # A metric without resamples has no interval.
    ends = [values.get(end) for end in (low, high)]
    return text if None in ends else f"{text} ({ends[0]:{sign}.4f} to {ends[1]:{sign}.4f})"
