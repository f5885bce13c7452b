"""What a plan will do and why, for a person: what is made, what will run, what changed since the line's last run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_retrain.core import graph, hashing, progress
from qlora_retrain.core.errors import Problem, describe
from qlora_retrain.pipeline import execute
from qlora_retrain.pipeline.plan import Plan, PlannedStep
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.store import NotFound, Store

_RUNS_LOOKED_AT = 50


def as_text(plan: Plan) -> str:
    """The plan as a table, a step a line."""
    lines = [f"run {plan.run_id} of line {plan.line}", f"plan {plan.uri}"]
    champion = plan.champion.version if plan.champion else "none yet"
    lines.append(f"champion {champion}")
    if plan.anchor:
        lines.append(f"anchor {plan.anchor.version}: the best version so far")
    if plan.reference:
        lines.append(f"data reference {plan.reference.version}")
    lines += [f"{c.field} = {c.value}: {c.reason}" for c in plan.choices]
    if plan.unchanged:
        lines.append(f"unchanged: production is already {plan.unchanged}, made by this recipe; nothing will run")
        return "\n".join(lines)
    before = previous(open_store(plan.root), plan)
    for planned in plan.steps:
        lines.append(f"  {planned.name:<15} {planned.key[:12]}  {_state(plan, planned, before)}")
    return "\n".join(lines)


def status_text(plan: Plan) -> str:
    """Where a run stands, a step a line."""
    store = open_store(plan.root)
    lines = [f"run {plan.run_id} of line {plan.line}"]
    if plan.unchanged:
        return "\n".join([*lines, f"unchanged: production was already {plan.unchanged}"])
    for planned in plan.steps:
        made = execute.manifest(plan, planned.name)
        if made is not None:
            text = f"{made.outcome}  {progress.one_line(made.numbers)}" + (f"  {made.reason}" if made.reason else "")
        else:
            text = _progress(store, plan, planned.name)
        lines.append(f"  {planned.name:<15} {text}")
    return "\n".join(lines)


def previous(store: Store, plan: Plan) -> Plan | None:
    """The line's newest plan before this one, or None."""
    runs = [r for r in store.children("runs") if r < plan.run_id]
    for run in sorted(runs, reverse=True)[:_RUNS_LOOKED_AT]:
        try:
            found = Plan.load(f"{store.uri}/runs/{run}/plan.json")
        except Problem:
            continue  # a run that never got its plan, or one of another schema
        if found.line == plan.line:
            return found
    return None


def _state(plan: Plan, planned: PlannedStep, before: Plan | None) -> str:
    code = execute.found(plan, planned.name)
    if code is not None:
        return f"made already: {describe(code)}"
    old = before.step(planned.name) if before else None
    if old is None:
        return "will run: no earlier run of this line"
    if old.key == planned.key:
        return "will run: planned before, but never finished"
    return "will run: " + ", ".join(_differences(old, planned))


def _differences(old: PlannedStep, new: PlannedStep) -> Iterator[str]:
    section = graph.step(new.name).section
    for name in sorted(old.identity.keys() | new.identity.keys()):
        was, now = old.identity.get(name), new.identity.get(name)
        if was != now:
            yield f"{section}.{name} was {was!r}, is {now!r}"
    for name, key in new.inputs.items():
        if old.inputs.get(name) != key:
            yield f"new {name}"
    if old.code != new.code:
        yield "new code or packages"


def _progress(store: Store, plan: Plan, step_name: str) -> str:
    try:
        update: Mapping[str, Any] = hashing.parse(store.read(f"runs/{plan.run_id}/status/{step_name}.json").data)
    except (NotFound, ValueError):
        return "not made"
    numbers = {k: v for k, v in update.items() if k not in ("what", "done", "total")}
    return f"{update['what']} {update['done']:g}/{update['total']:g}  {progress.one_line(numbers)}"


def artifact_folder(plan: Plan, step_name: str) -> str | None:
    """Where in the store the files of what a step made are; None while it is not made."""
    made = execute.manifest(plan, step_name)
    return f"{plan.root}/{artifact.folder(made.artifact, made.key)}/{made.attempt}" if made else None
