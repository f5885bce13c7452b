"""A run as one HTML page, and the reports of its steps, for an orchestrator's UI.

Command: `qlora-retrain status RUN --page FILE`
"""

from __future__ import annotations

from qlora_retrain.core import graph, hashing, html, progress
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import describe, is_refusal
from qlora_retrain.pipeline import new_rows, run_endings, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.artifact import Manifest


def page(plan: Plan) -> str:
    """Render the state of a run: one sentence about how it ended, then a table with a row for each step."""
    rows, folders = [], []
    for step in graph.STEPS:
        manifest = status.find_manifest(plan, step.name)
        # A step without an artifact may have failed; its ending says how.
        if manifest is None:
            failure = last_failure(plan, step.name)
            rows.append((step.name, describe(failure.code), failure.reason) if failure else (step.name, "not made", ""))
            continue
        numbers = progress.format_numbers(manifest.numbers)
        rows.append((step.name, describe(manifest.exit_code), manifest.reason or numbers))
        folders.append(f"{step.makes}: {plan.root}/{manifest.prefix}")

    return html.page(
        f"Run {plan.run_id} of {plan.line}",
        sentence(plan),
        html.table(("step", "state", "result"), rows),
        html.section("Files", *folders),
        html.section("What the run is about", *_pinned_files(plan)),
        html.section("Plan", plan.uri),
    )


def _pinned_files(plan: Plan) -> list[html.Html]:
    """Return the files of each source with their pins, by which the reports of its artifacts name them too."""
    return [
        html.details(
            f"{name}: {len(source.files):,} files or commits",
            html.table(("file", "bytes", "pin"), [(file.path, file.size_bytes, file.pin) for file in source.files]),
        )
        for name, source in plan.sources.items()
        if source
    ]


def sentence(plan: Plan) -> str:
    """Return a sentence that says how the run ended, or how far it is."""
    if plan.unchanged:
        return f"Nothing changed: production is already {plan.unchanged}, made by this recipe."
    if reason := new_rows.too_few(plan):
        return f"Nothing changed: {reason}."
    # A refusal ends a run on purpose, so it is named before the artifacts that are missing because of it.
    refusal = find_refusal(plan)
    if refusal is not None:
        return status.manifest_ending(refusal).sentence()

    incomplete = [step.name for step in graph.STEPS if status.find_manifest(plan, step.name) is None]
    if incomplete:
        failure = last_failure(plan, incomplete[0])
        logs = f"{plan.root}/runs/{plan.run_id}/logs"
        reason = f"{failure.sentence()}." if failure else f"{incomplete[0]} has no artifact yet."
        return f"Not finished: {reason} The logs are in {logs}."

    numbers = status.numbers(plan, graph.producer_name("release"))
    promoted = f", promoted to {numbers['promoted_to']}" if numbers.get("promoted_to") else ""
    return f"Published {numbers.get('version')}{promoted}."


def find_refusal(plan: Plan) -> Manifest | None:
    """Return the manifest of the step that refused, if one did."""
    manifests = (status.find_manifest(plan, step.name) for step in graph.STEPS)
    return next((m for m in manifests if m is not None and is_refusal(m.exit_code)), None)


def last_failure(plan: Plan, step_name: str) -> Ending | None:
    """Return the last failure of a step that has no artifact; None where it did not run, or did not fail."""
    ending = run_endings.read(open_store(plan.root), plan.run_id, step_name)
    return ending if ending is not None and ending.code else None


def step_page(plan: Plan, step_name: str) -> str | None:
    """Read the report that a step wrote, checked against its manifest; None where there is none.

    Raises:
        IntegrityError: If its hash differs from the manifest's.
    """
    manifest, name = status.find_manifest(plan, step_name), graph.step(step_name).report
    file = next((f for f in manifest.files if f.path == name), None) if manifest else None
    if manifest is None or file is None:
        return None

    store = open_store(plan.root)
    data: bytes = store.read(f"{manifest.prefix}/{file.path}").data
    # The page is shown in a browser, so it is verified like every other file.
    if hashing.sha256_bytes(data) != file.sha256:
        raise artifact.corruption_error(store, manifest, f"{file.path}: its sha256 differs from the manifest's")
    return data.decode()


def decisive_page(plan: Plan) -> str:
    """Read the report that explains how the run ended: that of the refusal, else the verdict's, else the run's page."""
    refusal = find_refusal(plan)
    verdict_step = graph.producer_name("evaluation")
    return (refusal and step_page(plan, refusal.step)) or step_page(plan, verdict_step) or page(plan)
