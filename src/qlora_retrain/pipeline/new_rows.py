"""Whether raw_data has enough new rows for a run of the schedule: `schedule.min_new_rows`.

The plan says how many rows the version in production was made from, and `validate_data` counts those of this run: only
it reads every format. Until it has, nobody knows; after it, no other step runs where the new rows are too few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from qlora_retrain.config.schedule import ScheduleConfig
from qlora_retrain.core import graph, progress
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.registry import Release

if TYPE_CHECKING:
    from qlora_retrain.pipeline.plan import Plan

_DATASET = "dataset"
# The number of the data gate's manifest that counts the rows of raw_data, also the bad and the repeated ones.
_ROWS_READ = "rows_read"


class MinNewRows(BaseModel):
    """What a plan says about new rows; the field names are the JSON of `plan.json`: never rename one.

    Attributes:
        minimum: The line's `schedule.min_new_rows`.
        production_rows: The rows of raw_data that were read for the version in production.
    """

    model_config = ConfigDict(frozen=True)
    minimum: int
    production_rows: int


def resolve(schedule: ScheduleConfig | None, champion: Release | None, *, is_scheduled: bool) -> MinNewRows | None:
    """Return what the plan says; None where any number of rows will do, with a sentence why where that may surprise."""
    minimum = schedule.min_new_rows if schedule else None
    if minimum is None or champion is None:
        return None
    if not is_scheduled:
        progress.say(f"started by hand, so schedule.min_new_rows does not count, which is {minimum:,}")
        return None
    rows = champion.numbers.get(_DATASET, {}).get(_ROWS_READ)
    if not isinstance(rows, int):
        progress.say(f"schedule.min_new_rows does not count: {champion.version} does not say how many rows it read")
        return None
    return MinNewRows(minimum=minimum, production_rows=rows)


def too_few(plan: Plan) -> str | None:
    """Return a sentence that says how many new rows there are, if they are too few; None also before they are counted.

    Raises:
        IntegrityError: If the manifest of the dataset is damaged.
    """
    if plan.min_new_rows is None:
        return None
    step = plan.step(graph.producer_name(_DATASET))
    manifest = artifact.find_manifest(open_store(plan.root), _DATASET, step.key)
    rows = manifest.numbers.get(_ROWS_READ) if manifest is not None and manifest.outcome == "done" else None
    if not isinstance(rows, int):
        return None
    num_new, minimum = rows - plan.min_new_rows.production_rows, plan.min_new_rows.minimum
    if num_new >= minimum:
        return None
    fewer = f" ({-num_new:,} fewer than production's)" if num_new < 0 else ""
    return f"too little new data: {max(num_new, 0):,} new rows{fewer}, schedule.min_new_rows is {minimum:,}"


def describe(rule: MinNewRows) -> str:
    """Return a sentence about the rule, for the plan's table."""
    return (
        f"schedule.min_new_rows: production was made from {rule.production_rows:,} rows; with fewer than "
        f"{rule.minimum:,} more, the run ends after {graph.producer_name(_DATASET)} as unchanged"
    )
