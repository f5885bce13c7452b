"""Plan a run and write nothing: what a dry run shows.

Reads what the plan of a run reads. Refuses what that plan would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from qlora_retrain.config.line import load
from qlora_retrain.pipeline import evaluation_history, explain, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store


def preview_plan(line: Path | str, root: str, *, run: str, overrides: Sequence[str] = ()) -> Plan:
    """Return the plan that a run would get now.

    Args:
        line: The line's YAML file, or the document itself.
        root: The store's URI.
        run: The run's id.
        overrides: `section.field=value` strings.

    Raises:
        UsageError: With every error of the config at once, or for a source or store that cannot be used.
        IntegrityError: For an unsafe base model.
    """
    config, store = load(line, overrides), open_store(root)
    make_plan.refuse_without_keys(store)
    history = evaluation_history.read(store, config.line, config.data.history_of)
    return make_plan.build_plan(config, store, run, datetime.now(UTC), history, is_started_by_schedule=False)


def note(plan: Plan) -> str:
    """Return what would run and why, a line a step, for the note of a dry run."""
    if plan.unchanged:
        return f"Dry run: nothing would run, since production is already {plan.unchanged}, made by this recipe."
    forecasts = explain.step_forecasts(plan)
    lines = (f"{name}: {text.replace('will run', 'would run', 1)}" for name, text in forecasts.items())
    return "\n".join(("Dry run: no step ran.", *lines))
