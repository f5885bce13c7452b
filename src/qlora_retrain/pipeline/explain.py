"""Explain a plan to a person: which artifacts exist, which steps will run, and what changed since the last run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from qlora_retrain.config.line import LineConfig
from qlora_retrain.core import graph, progress, visible_text
from qlora_retrain.core.errors import Problem, describe
from qlora_retrain.evaluation.data_files import find_beside_data
from qlora_retrain.lm.adapter_scale import describe_adapter
from qlora_retrain.pipeline import code_identity, earlier_adapters, new_rows, rejection_notes, run_page, status
from qlora_retrain.pipeline.plan import Plan, plan_uri
from qlora_retrain.pipeline.planned_steps import PlannedStep
from qlora_retrain.storage import open_store, signatures
from qlora_retrain.storage.sources import PinnedSource
from qlora_retrain.storage.store import Store

# A line's last run is among the newest runs of the store; a store may have thousands.
_MAX_RUNS_READ = 50
# Files that are named in one line.
_MAX_NAMES = 10
# Sources whose rows the data gate reads.
_DATA_SOURCES = ("raw_data", "golden_data", "eval_data", "replay_data")
_UNMATCHED = {
    "pattern": "that no pattern takes",
    "hidden": "hidden, as their names begin with a dot",
    "folder": "folders in which no pattern takes anything",
}


def as_text(plan: Plan, *, is_preview: bool = False) -> str:
    """Return the plan as a table, one line for each step.

    Args:
        plan: The plan.
        is_preview: The plan is not in the store, and nothing will run by it.
    """
    if is_preview:
        lines = [f"preview for line {plan.line} at {plan.created_at}: nothing is written, and no step runs"]
    else:
        lines = [f"run {plan.run_id} of line {plan.line}", f"plan {plan.uri}"]
        lines.append(signatures.describe(open_store(plan.root)))
    lines.append(f"champion {plan.champion.version if plan.champion else 'none yet'}")
    if plan.anchor:
        lines.append(f"anchor {plan.anchor.version}: the best version so far")
    if plan.reference:
        lines.append(f"data reference {plan.reference.version}")
    if plan.history:
        chats = f"{plan.history.chats:,} chats that were evaluated before are not trained on"
        lines.append(f"evaluation history {plan.history.sha256[:12]}: {chats}")
    lines += [f"{c.field} = {c.value}: {c.reason}" for c in plan.choices]
    data_format = next(
        step.config.get("format", "auto") for step in plan.steps if graph.step(step.name).section == "data"
    )
    lines += [n for name, source in plan.sources.items() if source for n in source_notes(name, source, data_format)]

    lines += rejection_notes.notes(plan)
    if sentence := status.nothing_to_do(plan):
        lines.append(f"{sentence}; nothing will run")
        return "\n".join(lines)
    if plan.min_new_rows:
        lines.append(new_rows.describe(plan.min_new_rows))

    train = next(planned.identity for planned in plan.steps if graph.step(planned.name).section == "train")
    lines.append(f"adapter: {describe_adapter(train['rank'], train['alpha'], train['method'])}")
    lines += earlier_adapters.describe(plan)
    forecasts = step_forecasts(plan)
    for planned in plan.steps:
        lines.append(f"  {planned.name:<15} {planned.key[:12]}  {forecasts[planned.name]}")
    return "\n".join(lines)


def step_forecasts(plan: Plan) -> dict[str, str]:
    """Return by step whether it will run, and why."""
    # The comparison is with the line's last run, since that is the one that a person remembers.
    earlier = previous_plan(open_store(plan.root), plan)
    return {planned.name: _forecast(plan, planned, earlier) for planned in plan.steps}


def source_notes(name: str, source: PinnedSource, data_format: str) -> Iterator[str]:
    """Yield what a person should know of a source: how many files are taken, which are not, and what is not pinned."""
    paths = [file.path for file in source.content]
    groups = [(_UNMATCHED[group.reason], group.count, group.names) for group in source.unmatched]
    if name in _DATA_SOURCES and (beside := find_beside_data(paths, data_format)):
        groups.append(("that hold no rows by their names", len(beside), tuple(beside)))
        paths = [path for path in paths if path not in beside]
    if source.is_listed:
        num_left_out = sum(count for _, count, _ in groups)
        text = "; ".join(f"{count:,} {reason} ({_listing(names, count)})" for reason, count, names in groups)
        count = f"{len(paths):,} file{'' if len(paths) == 1 else 's'} taken"
        yield f"{name}: {count}, {num_left_out:,} left out" + (f": {text}" if groups else "")
    else:
        yield f"{name}: the Hub does not list its files here (network, access), so only the commit is pinned"
    if source.left_out:
        yield f"left out of {name}: {_listing(source.left_out, len(source.left_out))}"


def _listing(names: Sequence[str], count: int) -> str:
    listed = ", ".join(visible_text.escape_controls(name) for name in names[:_MAX_NAMES])
    return listed + (f", ... ({count} in all)" if count > len(names[:_MAX_NAMES]) else "")


def status_text(plan: Plan) -> str:
    """Return the state of a run, one line for each step."""
    store = open_store(plan.root)
    lines = [f"run {plan.run_id} of line {plan.line}", signatures.describe(store)]
    if plan.unchanged:
        return "\n".join([*lines, f"unchanged: production was already {plan.unchanged}"])
    if sentence := status.nothing_to_do(plan):
        return "\n".join([*lines, sentence])

    for planned in plan.steps:
        manifest = status.find_manifest(plan, planned.name)
        if manifest is None:
            text = _progress_text(plan, planned.name)
        else:
            reason = f"  {manifest.reason}" if manifest.reason else ""
            text = f"{manifest.outcome}  {progress.format_numbers(manifest.numbers)}{reason}"
        # Further lines stand below the first, so that no text of a step can pass for the line of another one.
        lines.append(f"  {planned.name:<15} {text}".replace("\n", f"\n{' ' * 18}"))
    note = run_page.approval_note(plan)
    return "\n".join([*lines, note] if note else lines)


def previous_plan(store: Store, plan: Plan) -> Plan | None:
    """Return the line's newest plan before this one, or None."""
    runs = [run for run in store.children("runs") if run < plan.run_id]
    return next((earlier for earlier in _plans(store, runs) if earlier.line == plan.line), None)


def newest_plan(store: Store) -> Plan | None:
    """Return the newest plan of any line, or None."""
    return next(newest_plans(store), None)


def newest_plans(store: Store) -> Iterator[Plan]:
    """Yield the newest plans of all lines, the newest first."""
    yield from _plans(store, store.children("runs"))


def _plans(store: Store, runs: Iterable[str]) -> Iterator[Plan]:
    for run in sorted(runs, reverse=True)[:_MAX_RUNS_READ]:
        # A run may never have got its plan, or has one of another schema.
        with contextlib.suppress(Problem):
            yield Plan.read(plan_uri(store.uri, run))


def changes_since(plan: Plan, config: LineConfig) -> list[str]:
    """Return what has changed since a run's plan was made: settings, addresses of sources, code.

    The sources themselves are not read again: that takes minutes, and the run keeps its plan whatever they hold now.
    """
    changes = [f"{name} was {before!r}, is {now!r}" for name, before, now in setting_changes(plan, config)]
    return changes + [
        f"{planned.name}: new code or packages"
        for planned in plan.steps
        if code_identity.code_hash(planned.name) != planned.code
    ]


def setting_changes(plan: Plan, config: LineConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting and source of a plan that the line has otherwise: its name, the plan's value, the line's."""
    automatic_fields = {choice.field for choice in plan.choices}
    for planned in plan.steps:
        section_name = graph.step(planned.name).section
        section = config.section(section_name)
        for name, now in section.model_dump(mode="json").items():
            field, before = f"{section_name}.{name}", planned.config.get(name)
            # The plan has the value that an automatic choice had then, or that there was nothing to choose.
            was_automatic = field in automatic_fields or not before
            is_automatic = now in (None, "auto") or (field in automatic_fields and name not in section.model_fields_set)
            if before != now and not (was_automatic and is_automatic):
                yield field, before, now

    for name, pinned in plan.sources.items():
        source = getattr(config.sources, name)
        before, now = pinned.uri if pinned else None, source.uri if source else None
        # Of a source that is one file, the plan has its folder.
        folder, _, file = (now or "").rpartition("/")
        is_that_file = pinned is not None and before == folder and [quote(f.path) for f in pinned.files] == [file]
        if before != now and not is_that_file:
            yield f"sources.{name}", before, now


def _forecast(plan: Plan, planned: PlannedStep, earlier: Plan | None) -> str:
    """Return whether a step will run, and why."""
    # An artifact in the store counts, whichever run made it.
    code = status.exit_code(plan, planned.name)
    if code is not None:
        return f"made already: {describe(code)}"

    before = earlier.step(planned.name) if earlier else None
    if before is None:
        return "will run: no earlier run of this line"
    if before.key == planned.key:
        return "will run: planned before, but never finished"
    return "will run: " + ", ".join(_differences(before, planned))


def _differences(before: PlannedStep, planned: PlannedStep) -> Iterator[str]:
    """Yield a phrase for each change that gave the step another key."""
    section = graph.step(planned.name).section
    for name in sorted(before.identity.keys() | planned.identity.keys()):
        old, new = before.identity.get(name), planned.identity.get(name)
        if old != new:
            yield f"{section}.{name} was {old!r}, is {new!r}"

    # Keys are hashes, which mean nothing to a person: only the names of changed inputs are listed.
    for name, key in planned.inputs.items():
        if before.inputs.get(name) != key:
            yield f"new {name}"
    if before.code != planned.code:
        yield "new code or packages"


def _progress_text(plan: Plan, step_name: str) -> str:
    """Return the progress of a step that has no artifact yet, or how it last failed."""
    failure = run_page.last_failure(plan, step_name)
    if failure is not None:
        return f"not made  {failure.summary()}"
    return status.progress_text(plan, step_name) or "not made"
