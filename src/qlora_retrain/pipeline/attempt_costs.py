"""What attempts cost that ended before their step was done: kept beside its checkpoints, and added when it is.

    scratch/<step>/<key>/<attempt>/cost.json

An attempt that is killed without warning writes nothing, so it is missing from the sum.
"""

from __future__ import annotations

import contextlib

from qlora_retrain.core import json_depth
from qlora_retrain.core.errors import Problem
from qlora_retrain.pipeline import cost
from qlora_retrain.pipeline.cost import StepCost
from qlora_retrain.storage.store import Store

_FILE = "cost.json"
_MAX_ATTEMPTS = 50  # that are read


def save(store: Store, prefix: str, attempt: str, step_cost: StepCost) -> None:
    """Write what an attempt cost; the reason why it ended is more important than this, so no error is raised."""
    with contextlib.suppress(Problem, OSError):
        store.write_if_absent(f"{prefix}/{attempt}/{_FILE}", step_cost.model_dump_json().encode())


def add_earlier(store: Store, prefix: str, own: StepCost) -> StepCost:
    """Return the cost of a step: of its last attempt, and of those before it."""
    earlier: list[StepCost] = []
    with contextlib.suppress(Problem, OSError):
        paths = [entry.path for entry in store.list(prefix) if entry.path.endswith(f"/{_FILE}")]
        for path in paths[:_MAX_ATTEMPTS]:
            # Scratch is not signed, so anything may lie there.
            with contextlib.suppress(ValueError):
                earlier.append(StepCost.model_validate(json_depth.loads(store.read(path).data)))
    return cost.combine(own, earlier)
