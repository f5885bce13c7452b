"""Look up which artifacts of a plan are in the store, for runtimes, pages and the command line.

Only the manifest in the store counts; the exit code of a process is no proof.
"""

from __future__ import annotations

from qlora_retrain.core import graph, progress
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Exit
from qlora_retrain.core.outcome import Number
from qlora_retrain.pipeline import new_rows
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.store import NotFound

# An update has some hundred bytes. Every step may write it, so a longer one is none.
_MAX_UPDATE_BYTES = 16 * 1024


def exit_code(plan: Plan, step_name: str) -> int | None:
    """Return the exit code of the artifact that is in the store: 0, 10 or 11; None if the step must run.

    Raises:
        IntegrityError: If the artifact is there but not as its manifest promises.
    """
    if plan.unchanged:
        return int(Exit.DONE)
    manifest = find_manifest(plan, step_name)
    # An artifact that exists is checked as ever: the rows are counted from one.
    if manifest is None and new_rows.too_few(plan):
        return int(Exit.DONE)
    if manifest is None:
        return None
    # The sizes of all files and not their hashes, because this runs before every task and must stay cheap.
    artifact.check_files(open_store(plan.root), manifest)
    return manifest.exit_code


def nothing_to_do(plan: Plan) -> str | None:
    """Return a sentence that says why this run publishes nothing new, and trains nothing; None if it does its work."""
    if plan.unchanged:
        return f"unchanged: production is already {plan.unchanged}, made by this recipe"
    reason = new_rows.too_few(plan)
    return f"unchanged: {reason}" if reason else None


def find_manifest(plan: Plan, step_name: str) -> Manifest | None:
    """Return the manifest of the step's artifact in this plan, or None while there is none."""
    step = graph.step(step_name)
    return artifact.find_manifest(open_store(plan.root), step.makes, plan.step(step_name).key)


def earlier_refusal(plan: Plan, step_name: str) -> Ending:
    """Return the ending of a step that an earlier try or run has refused: its manifest has the reason."""
    manifest = find_manifest(plan, step_name)
    assert manifest is not None
    return manifest_ending(manifest, prefix="as before: ")


def manifest_ending(manifest: Manifest, *, prefix: str = "") -> Ending:
    """Return how the step of this manifest ended."""
    return Ending(
        code=manifest.exit_code,
        cause=Ending.from_exit_code(manifest.step, manifest.exit_code).cause,
        reason=f"{prefix}{manifest.reason or ''}" if manifest.exit_code else "",
        step=manifest.step,
        key=manifest.key,
        attempt=manifest.attempt,
    )


def progress_text(plan: Plan, step_name: str) -> str | None:
    """Return the last progress update of a step as text; None where there is none that can be read."""
    try:
        data = open_store(plan.root).read_start(f"runs/{plan.run_id}/status/{step_name}.json", _MAX_UPDATE_BYTES)
    except NotFound:
        return None
    update = progress.from_json(data)
    return progress.describe(update) if update else None


def numbers(plan: Plan, step_name: str) -> dict[str, Number]:
    """Return the numbers of the step's artifact; empty while there is none."""
    manifest = find_manifest(plan, step_name)
    return dict(artifact.summary(manifest)) if manifest else {}
