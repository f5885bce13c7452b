"""A run as one HTML page, and the reports of its steps, for an orchestrator's UI.

Command: `qlora-retrain status RUN --page FILE`
"""

from __future__ import annotations

from qlora_retrain.core import graph, html, progress
from qlora_retrain.core.aliases import PRODUCTION, STAGING
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import IntegrityError, describe, is_refusal
from qlora_retrain.pipeline import cost, new_rows, run_endings, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, moves, open_store, verified_files
from qlora_retrain.storage.artifact import Manifest


def page(plan: Plan) -> str:
    """Render the state of a run: one sentence about how it ended, then a table with a row for each step."""
    rows, folders = [], []
    for step in graph.STEPS:
        manifest = status.find_manifest(plan, step.name)
        # A step without an artifact may have failed; its ending says how.
        if manifest is None:
            rows.append((step.name, *_state_without_artifact(plan, step.name)))
            continue
        numbers = progress.format_numbers(manifest.numbers)
        rows.append((step.name, describe(manifest.exit_code), manifest.reason or numbers))
        folders.append(f"{step.makes}: {plan.root}/{manifest.prefix}")

    return html.page(
        f"Run {plan.run_id} of {plan.line}",
        sentence(plan),
        html.table(("step", "state", "result"), rows),
        html.section("Cost", *_cost(plan)),
        html.section("Files", *folders),
        html.section("What the run is about", *_pinned_files(plan)),
        html.section("Plan", plan.uri),
    )


def _state_without_artifact(plan: Plan, step_name: str) -> tuple[str, str]:
    """Return how a step without an artifact failed, or how far it was when it last said so."""
    failure = last_failure(plan, step_name)
    if failure is not None:
        return describe(failure.code), failure.reason
    last_report = status.progress_text(plan, step_name)
    # A step that was killed says nothing any more, so this is no proof that it still runs.
    return ("not made yet", f"last report: {last_report}") if last_report else ("not made", "")


def _cost(plan: Plan) -> list[html.Html | str]:
    """Return what the run and the steps before it cost; older releases measured nothing."""
    manifests = [status.find_manifest(plan, step.name) for step in graph.STEPS]
    costs = cost.read(manifest for manifest in manifests if manifest is not None)
    return [html.table(cost.HEADERS, cost.rows(costs, plan.run_id))] if costs else ["It was not measured."]


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
    return " ".join(filter(None, (f"Published {numbers.get('version')}{promoted}.", approval_note(plan))))


def approval_note(plan: Plan) -> str | None:
    """Return what a person does to move production, where the run has stopped at staging; None where it has not."""
    numbers = status.numbers(plan, graph.producer_name("release"))
    if numbers.get("promoted_to") != STAGING:
        return None
    version, champion = numbers["version"], plan.champion.version if plan.champion else moves.NOTHING
    if moves.describe_current(open_store(plan.root), plan.line) == version:
        return f"It was approved: {PRODUCTION} names {version}."
    return (
        f"It waits for approval, and {PRODUCTION} has not moved; a person who approves runs: qlora-retrain promote "
        f"{plan.line} {version} --from {champion} --reason TEXT"
    )


def find_refusal(plan: Plan) -> Manifest | None:
    """Return the manifest of the step that refused, if one did."""
    manifests = (status.find_manifest(plan, step.name) for step in graph.STEPS)
    return next((m for m in manifests if m is not None and is_refusal(m.exit_code)), None)


def last_failure(plan: Plan, step_name: str) -> Ending | None:
    """Return the last failure of a step that has no artifact; None where it did not run, or did not fail."""
    ending = run_endings.read(open_store(plan.root), plan.run_id, step_name)
    return ending if ending is not None and ending.code else None


def step_report(plan: Plan, step_name: str) -> bytes | None:
    """Read the report that a step wrote, checked against its manifest; None where there is none.

    Raises:
        IntegrityError: If it is missing, or its hash differs from the manifest's.
        UsageError: If it is too large to be shown.
    """
    name = graph.step(step_name).report
    # The page is shown in a browser, so it is verified like every other file.
    return verified_file(plan, step_name, name) if name else None


def verified_file(plan: Plan, step_name: str, name: str) -> bytes | None:
    """Read a small file of a step's artifact, checked against its manifest; None where there is none.

    Raises:
        IntegrityError: If it is missing, or its hash differs from the manifest's.
        UsageError: If it is too large to be shown.
    """
    manifest = status.find_manifest(plan, step_name)
    file = verified_files.find_file(manifest.files, name) if manifest else None
    if manifest is None or file is None:
        return None
    store = open_store(plan.root)
    try:
        return verified_files.read_verified(store, manifest.prefix, file)
    except IntegrityError as error:
        raise artifact.corruption_error(store, manifest, str(error)) from error


def step_page(plan: Plan, step_name: str) -> str | None:
    """Return the report of a step as text, as `step_report` reads it."""
    data = step_report(plan, step_name)
    return None if data is None else data.decode(errors="replace")


def decisive_page(plan: Plan) -> str:
    """Read the report that explains how the run ended: that of the refusal, else the verdict's, else the run's page."""
    refusal = find_refusal(plan)
    verdict_step = graph.producer_name("evaluation")
    return (refusal and step_page(plan, refusal.step)) or step_page(plan, verdict_step) or page(plan)
