"""Show what was tried before the form that ships was chosen: as JSON for `certificate.json`, and as charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.merge_adapter.trials import Choice, Trial
from qlora_retrain.core import html
from qlora_retrain.core.html import Html


def as_json(choice: Choice) -> list[dict[str, Any]]:
    """Return every candidate that was tried; published versions hold it, so its names never change."""
    return [
        {
            "form": trial.candidate.name,
            "base": trial.candidate.base,
            "rank": trial.candidate.rank or choice.full_rank,
            "strength": trial.candidate.strength,
            "reduced_intruders": trial.candidate.has_reduced_intruders,
            "adapters": trial.candidate.num_adapters,
            "loss": _finite(trial.loss),
            "cost_nats": _finite(trial.cost),
            "forgetting": {
                rule.name: {"value": rule.value, "low": rule.low, "high": rule.high, "limit": rule.limit}
                for rule in trial.forgetting
            },
            "is_within_limits": trial.is_within_limits if trial.forgetting else None,
            "ships": trial is choice.winner,
        }
        for trial in choice.trials
    ]


def sections(choice: Choice) -> list[Html]:
    """Return a section for the ranks and one for the strengths, where several were tried."""
    # What lost a stage was neither cut nor weakened.
    winner = choice.winner.candidate
    trials = [
        t for t in choice.trials if (t.candidate.base, t.candidate.num_adapters) == (winner.base, winner.num_adapters)
    ]
    ranks = [t for t in trials if t.candidate.strength == 1 and not t.candidate.has_reduced_intruders]
    strengths = [t for t in trials if t.forgetting and t.candidate.rank == winner.rank]
    sections = []
    if len(ranks) > 1:
        points = [(float(t.candidate.rank or choice.full_rank or 0), t.cost) for t in ranks]
        chart = html.line_chart({"cost": points}, "rank", "nats per token lost against the unmerged model")
        sections.append(html.section("What a smaller rank costs", chart, _table(choice, ranks)))
    if len(strengths) > 1:
        weakened = [t for t in strengths if not t.candidate.has_reduced_intruders]
        series = {"lost on the task, against the unmerged model": [(t.candidate.strength, t.cost) for t in weakened]}
        for name in [rule.name for rule in strengths[0].forgetting]:
            points = [
                (t.candidate.strength, r.value) for t in weakened for r in t.forgetting if r.name == name and r.value
            ]
            series[f"{name.replace('_', ' ')}, against the base"] = points
        chart = html.line_chart(series, "strength", "nats per token, or share of right tokens")
        sections.append(
            html.section("What a weaker adapter costs, and what it forgets", chart, _table(choice, strengths))
        )
    return sections


def _table(choice: Choice, trials: Sequence[Trial]) -> Html:
    rules = trials[0].forgetting
    headers = ["form", "rank", "loss, nats per token", "against the unmerged model"]
    headers += [f"{rule.name.replace('_', ' ')} (limit {rule.limit:g})" for rule in rules if rule.limit]
    rows: list[list[object]] = []
    for trial in trials:
        name = html.join(trial.candidate.name, " (ships)" if trial is choice.winner else "")
        cells: list[object] = [name, trial.candidate.rank or choice.full_rank, trial.loss, trial.cost]
        cells += ["-" if r.value is None else f"{r.value:.4f} ({r.low:.4f} to {r.high:.4f})" for r in trial.forgetting]
        rows.append(cells)
    return html.table(headers, rows, caption="on the rows and the passages that choose")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
