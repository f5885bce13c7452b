"""A run on one page, and the reports of its steps: what an orchestrator's UI shows to a person.

Command: `qlora-retrain status RUN --page FILE`
"""

from __future__ import annotations

from qlora_retrain.core import graph, hashing, html, progress
from qlora_retrain.core.errors import describe, refusal
from qlora_retrain.pipeline import execute
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.artifact import Manifest


def page(plan: Plan) -> str:
    """Where the run stands, a step a row, under the one sentence that says how it ended."""
    rows, files = [], []
    for step in graph.STEPS:
        made = execute.manifest(plan, step.name)
        state = describe(made.exit_code) if made else "not made"
        numbers = progress.one_line(made.numbers) if made else ""
        rows.append((step.name, state, made.reason if made and made.reason else numbers))
        if made is not None:
            files.append(f"{step.makes}: {plan.root}/{made.prefix}")
    return html.page(
        f"Run {plan.run_id} of {plan.line}",
        sentence(plan),
        html.table(("step", "state", "what it found"), rows),
        html.section("Files", *files),
        html.section("Plan", plan.uri),
    )


def sentence(plan: Plan) -> str:
    """How the run ended, or where it is."""
    if plan.unchanged:
        return f"Nothing changed: production is already {plan.unchanged}, made by this recipe."
    refused = refusal_of(plan)
    if refused is not None:
        return f"{refused.step}: {describe(refused.exit_code)} ({refused.exit_code}): {refused.reason}"
    missing = [step.name for step in graph.STEPS if execute.manifest(plan, step.name) is None]
    if missing:
        return f"Not finished: {missing[0]} has made nothing; its log is in {plan.root}/runs/{plan.run_id}/logs."
    numbers = execute.summary(plan, "publish")
    promoted = f", promoted to {numbers['promoted_to']}" if numbers.get("promoted_to") else ""
    return f"Published {numbers.get('version')}{promoted}."


def refusal_of(plan: Plan) -> Manifest | None:
    """The artifact of the step that refused, if one did."""
    made = (execute.manifest(plan, step.name) for step in graph.STEPS)
    return next((m for m in made if m is not None and refusal(m.exit_code)), None)


def step_page(plan: Plan, step_name: str) -> str | None:
    """The report that a step wrote, checked against its manifest; None where there is none.

    Raises:
        IntegrityError: If it is not what the manifest promises.
    """
    made, name = execute.manifest(plan, step_name), graph.step(step_name).report
    promised = next((f for f in made.files if f.path == name), None) if made else None
    if made is None or promised is None:
        return None
    store = open_store(plan.root)
    data = store.read(f"{made.prefix}/{promised.path}").data
    if hashing.sha256_bytes(data) != promised.sha256:
        raise artifact.corrupt(store, made, f"{promised.path}: its sha256 differs from the manifest's")
    return data.decode()


def decisive_page(plan: Plan) -> str:
    """The report that says why the run ended as it did: the refusal's, else the verdict's, else the run's own."""
    refused = refusal_of(plan)
    return (refused and step_page(plan, refused.step)) or step_page(plan, "evaluate") or page(plan)
