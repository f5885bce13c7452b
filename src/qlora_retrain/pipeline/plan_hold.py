"""Let a plan count, so that no collection of garbage removes what it names; see `storage/collection_mark.py`.

runs/<run_id>/plan.json                 counts for 30 days
runs/<run_id>/renewed/<time>.json       the run is begun again: 30 days from then on
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta

from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline.plan import Plan, plan_path, utc_stamp
from qlora_retrain.pipeline.stored_names import STAMPED, time_of
from qlora_retrain.storage import registry
from qlora_retrain.storage.collection_mark import wait_until_unmarked
from qlora_retrain.storage.store import AlreadyExists, NotFound, Store

# A run that is begun again so long after its plan was made says so.
_RENEWED_AFTER = timedelta(days=1)


def write_plan(store: Store, plan: Plan) -> None:
    """Write a plan, and let it count.

    Raises:
        AlreadyExists: If the run has a plan.
        UsageError: As `hold`.
        TryAgain: As `hold`.
    """
    store.write_if_absent(plan_path(plan.run_id), plan.to_bytes())
    hold(store, plan)


def hold(store: Store, plan: Plan) -> None:
    """Let a plan of the store count, and wait until no collection is about to remove what it names.

    Called before any step of the run looks for an artifact.

    Raises:
        UsageError: If a version that it pins was collected while it was made.
        TryAgain: If collections are in the way again and again.
    """
    now = datetime.now(UTC)
    if STAMPED.fullmatch(plan.run_id) and now - time_of(plan.run_id) > _RENEWED_AFTER:
        with contextlib.suppress(AlreadyExists):
            store.write_if_absent(f"runs/{plan.run_id}/renewed/{utc_stamp(now)}.json", b"{}\n")

    # These are named by nothing but the plan; the others are in the last moves of an alias.
    pinned = [version for version in (plan.reference, plan.start, *plan.earlier_adapters) if version is not None]
    names = {plan.run_id, *(step.key for step in plan.steps), *(version.version for version in pinned)}
    wait_until_unmarked(store, names)
    for version in pinned:
        path = f"{registry.version_folder(plan.line, version.version)}/manifest.json"
        try:
            store.read_start(path, 1)
        except NotFound:
            raise UsageError(
                f"{store.uri}/{path}: was removed by a collection of garbage while run {plan.run_id} was planned; "
                "start a new run"
            ) from None
