"""One attempt of a step: fetch its inputs, call it, and upload its files, the manifest last."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_retrain.config.line import section_model
from qlora_retrain.core import graph, signals
from qlora_retrain.core.errors import Exit
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import attempt_costs, checkpoint_sync, cost, fetch
from qlora_retrain.pipeline.cost import StepCost
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.pipeline.planned_steps import PlannedStep
from qlora_retrain.pipeline.step_meter import StepMeter
from qlora_retrain.storage import artifact, cache, keys, signatures
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.store import Store

StepFunction = Callable[..., StepResult]  # a component's `step.run`


def run_attempt(
    plan: Plan,
    step: graph.Step,
    planned: PlannedStep,
    store: Store,
    inputs: Mapping[str, Manifest],
    load: Callable[[], StepFunction],
) -> Manifest:
    """Run the step in a new folder and write its artifact; return the artifact's manifest."""
    # Now and not after hours of work.
    signatures.refuse_without_key(store, keys.step_role(step, plan.line))
    attempt, started_at = artifact.new_attempt_id(), datetime.now(UTC)
    # After the checks above: importing torch takes seconds, and most retries find their artifact made.
    run = load()
    config = section_model(step.section).model_validate(planned.config).with_reasons(plan.choice_reasons(step.section))

    with cache.work_folder() as work:
        output = work / step.makes
        output.mkdir()
        arguments: dict[str, Any] = {"config": config, step.makes: output}
        # `publish` copies from the store to the store, so it gets no folders.
        if step.kind == graph.StepKind.PUBLISH:
            for manifest in inputs.values():
                artifact.check_files(store, manifest)
            arguments |= {**inputs, "plan": plan, "store": store}
        else:
            arguments |= {i.name: fetch.fetch_input(plan, planned, store, i, inputs) for i in step.reads}

        # Fetching and uploading are not counted: they depend on the network, not on the step.
        meter, scratch_prefix = StepMeter(planned.config), f"scratch/{step.name}/{planned.key}"
        try:
            with meter, _scratch_folder(store, step, scratch_prefix, attempt, work) as scratch:
                result = _call(run, step, {**arguments, **scratch})
        except BaseException:
            if step.scratch:
                attempt_costs.save(store, scratch_prefix, attempt, meter.cost(plan.run_id, {}))
            raise
        step_cost = meter.cost(plan.run_id, result.numbers)
        if step.scratch:
            step_cost = attempt_costs.add_earlier(store, scratch_prefix, step_cost)

        # A library can swallow the exception by which a signal stops a step. What came after is no result.
        if signals.stop_requested() and not step.scratch:
            raise signals.StoppedBySignal("stopped by a signal; run the same command again to continue")
        refusal = result.refused
        manifest = Manifest(
            artifact=step.makes,
            key=planned.key,
            step=step.name,
            attempt=attempt,
            outcome="refused" if refusal else "done",
            exit_code=refusal.exit_code if refusal else Exit.DONE,
            # A refusal is a complete artifact: its report is kept, and a retry finds it.
            reason=str(refusal) if refusal else None,
            numbers={**result.numbers, "seconds": meter.seconds},
            files=artifact.list_files(output),
            inputs=planned.inputs,
            read={name: manifest.content_hash for name, manifest in inputs.items()},
            config=planned.identity,
            code=planned.code,
            provenance=_provenance(plan, started_at) | {cost.COSTS: _costs(inputs, step, step_cost)},
        )
        manifest = artifact.complete(store, output, manifest, line=plan.line)
    # Only now, because until the manifest exists the next try may need the checkpoints.
    if step.scratch:
        checkpoint_sync.remove(store, scratch_prefix)
    return manifest


@contextlib.contextmanager
def _scratch_folder(store: Store, step: graph.Step, prefix: str, attempt: str, work: Path) -> Iterator[dict[str, Path]]:
    """Yield a step's scratch folder, if it has one: restored before, uploaded while it runs and after a failure."""
    if not step.scratch:
        yield {}
        return

    folder = work / "scratch"
    folder.mkdir()
    checkpoint_sync.restore(store, prefix, folder)
    uploader = checkpoint_sync.CheckpointUploader(store, prefix, attempt, folder)
    uploader.start()

    try:
        yield {"scratch": folder}
    except BaseException:
        uploader.stop(sync=True)  # the next try resumes from here
        raise
    uploader.stop(sync=False)


def _call(run: StepFunction, step: graph.Step, arguments: Mapping[str, Any]) -> StepResult:
    """Call a step's `run`, whose parameters must be the names of its inputs in the graph."""
    # Otherwise a step could ignore an input that is part of its key.
    expected, parameters = set(arguments), set(inspect.signature(run).parameters)
    if expected != parameters:
        raise TypeError(
            f"components.{step.name}.step.run: the graph passes ({', '.join(sorted(expected))}), "
            f"it takes ({', '.join(sorted(parameters))})"
        )

    result = run(**arguments)
    if not isinstance(result, StepResult):
        raise TypeError(f"components.{step.name}.step.run: expected a StepResult, found {type(result).__name__}")
    return result


def _costs(inputs: Mapping[str, Manifest], step: graph.Step, own: StepCost) -> dict[str, Any]:
    """Return what the step cost, and what those cost whose artifacts it read, so that a version's cost is known."""
    return {name: entry.model_dump() for name, entry in {**cost.read(inputs.values()), step.name: own}.items()}


def _provenance(plan: Plan, started_at: datetime) -> dict[str, Any]:
    """Return where, when and by what the artifact was made; nothing of it enters a key."""
    return {
        "run_id": plan.run_id,
        "started_at": started_at.isoformat(timespec="seconds"),
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "image": os.environ.get("QLORA_RETRAIN_IMAGE"),
    }
