"""A run on one page, and the reports of its steps: what an orchestrator's UI shows to a person.

Command: `qlora-retrain status RUN --page FILE`
"""

from __future__ import annotations

from qlora_retrain import artifact, graph, keys, progress, report, runner
from qlora_retrain.artifact import Manifest
from qlora_retrain.errors import describe, refusal
from qlora_retrain.plan import Plan
from qlora_retrain.store import open_store


def page(plan: Plan) -> str:
    """Where the run stands, a step a row, under the one sentence that says how it ended."""
    rows, files = [], []
    for step in graph.STEPS:
        made = runner.manifest(plan, step.name)
        state = describe(made.exit_code) if made else "not made"
        numbers = progress.one_line(made.numbers) if made else ""
        rows.append((step.name, state, made.reason if made and made.reason else numbers))
        if made is not None:
            files.append(f"{step.makes}: {plan.root}/{made.prefix}")
    return report.page(
        f"Run {plan.run_id} of {plan.line}",
        sentence(plan),
        report.table(("step", "state", "what it found"), rows),
        report.section("Files", *files),
        report.section("Plan", plan.uri),
    )


def sentence(plan: Plan) -> str:
    """How the run ended, or where it is."""
    if plan.unchanged:
        return f"Nothing changed: production is already {plan.unchanged}, made by this recipe."
    refused = refusal_of(plan)
    if refused is not None:
        return f"{refused.step}: {describe(refused.exit_code)} ({refused.exit_code}): {refused.reason}"
    missing = [step.name for step in graph.STEPS if runner.manifest(plan, step.name) is None]
    if missing:
        return f"Not finished: {missing[0]} has made nothing; its log is in {plan.root}/runs/{plan.run_id}/logs."
    numbers = runner.summary(plan, "publish")
    promoted = f", promoted to {numbers['promoted_to']}" if numbers.get("promoted_to") else ""
    return f"Published {numbers.get('version')}{promoted}."


def refusal_of(plan: Plan) -> Manifest | None:
    """The artifact of the step that refused, if one did."""
    made = (runner.manifest(plan, step.name) for step in graph.STEPS)
    return next((m for m in made if m is not None and refusal(m.exit_code)), None)


def step_page(plan: Plan, step_name: str) -> str | None:
    """The report that a step wrote, checked against its manifest; None where there is none.

    Raises:
        IntegrityError: If it is not what the manifest promises.
    """
    made, name = runner.manifest(plan, step_name), graph.step(step_name).report
    promised = next((f for f in made.files if f.path == name), None) if made else None
    if made is None or promised is None:
        return None
    store = open_store(plan.root)
    data = store.read(f"{made.prefix}/{promised.path}").data
    if keys.sha256_bytes(data) != promised.sha256:
        raise artifact.corrupt(store, made, f"{promised.path}: its sha256 differs from the manifest's")
    return data.decode()


def decisive_page(plan: Plan) -> str:
    """The report that says why the run ended as it did: the refusal's, else the verdict's, else the run's own."""
    refused = refusal_of(plan)
    return (refused and step_page(plan, refused.step)) or step_page(plan, "evaluate") or page(plan)
