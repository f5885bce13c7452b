"""Run one step of a plan: the same in a subprocess, a container, a pod and KFP. `step_main` is its command line.

If the step's artifact is in the store, there is nothing to do. Otherwise the step's code and inputs are checked, the
inputs are fetched into the node cache, and the step is called. Its files are uploaded, the manifest last. However the
step ends, the result is an `Ending`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from qlora_retrain.core import graph, progress, signals
from qlora_retrain.core.endings import Ending, Kind
from qlora_retrain.core.errors import Cause, Exit, UsageError
from qlora_retrain.lm import gguf_mixtures
from qlora_retrain.pipeline import code_identity, failures, fetch, run_endings, runlog, status
from qlora_retrain.pipeline.attempt import StepFunction as StepFunction
from qlora_retrain.pipeline.attempt import run_attempt
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.pipeline.planned_steps import PlannedStep
from qlora_retrain.storage import artifact, open_store, signatures
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.store import Store


def run_step(plan: Plan, step_name: str, load: Callable[[], StepFunction]) -> Ending:
    """Run a step and return its ending; its output is printed and also saved in the run's folder.

    Args:
        plan: The run's plan.
        step_name: The step.
        load: Imports the step's `run` and returns it. Called only when the inputs exist, because it takes seconds.
    """
    step, key = graph.step(step_name), plan.step(step_name).key
    signals.install(graceful=step.scratch)
    store = open_store(plan.root)
    if plan.signature is None:
        progress.say(f"{step_name}: {signatures.describe(store)}")
    with runlog.capture_output(store, plan.run_id, step_name):
        try:
            run_endings.clear(store, plan.run_id, step_name)
            return _run_unless_complete(plan, step, store, load)
        except signals.StoppedBySignal as stopped:
            ending = Ending.from_problem(step_name, stopped, key=key)
        except Exception as error:  # noqa: BLE001 - the one place where our own bugs become an ending
            ending = failures.classify(step_name, error, key=key)
            # A traceback helps with our own bugs alone; every other reason says what to do.
            if ending.cause == Cause.BUG:
                traceback.print_exc()
        # For the person who reads the log; runtimes read the document that `step_main` writes.
        print(ending.sentence(), file=sys.stderr, flush=True)
        return ending


def _run_unless_complete(plan: Plan, step: graph.Step, store: Store, load: Callable[[], StepFunction]) -> Ending:
    """Return the ending of the artifact in the store; run the step where there is none."""
    planned = plan.step(step.name)
    # A retry, a second runtime and a later run of the same recipe all end here.
    manifest = None if plan.unchanged else artifact.find_manifest(store, step.makes, planned.key)
    if manifest is not None:
        artifact.check_files(store, manifest)
        progress.say(f"{step.name}: {step.makes} {planned.key[:12]} was made already by attempt {manifest.attempt}")
        return _report_ending(manifest)
    if sentence := status.nothing_to_do(plan):
        progress.say(f"{step.name}: {sentence}")
        return Ending(int(Exit.DONE), None, "unchanged", step.name, planned.key)

    _refuse_changed_code(planned)
    if step.image == "train":
        # Before hours of training: the step that exports runs in the same environment as this one.
        exports = [name for planned_step in plan.steps for name in planned_step.config.get("exports", ())]
        gguf_mixtures.refuse_without_quantizer(exports)
    # Manifests are small. They decide whether gigabytes have to be fetched at all.
    inputs = fetch.input_manifests(plan, step, store)
    for name, input_manifest in inputs.items():
        if input_manifest.outcome != "done":
            reason = f"not run, because its input {name} was refused: {input_manifest.reason}"
            progress.say(f"{step.name}: {reason}")
            return Ending(input_manifest.exit_code, Cause.INPUT_REFUSED, reason, step.name, planned.key)
    fetch.refuse_mixed_inputs(store, inputs)

    _print_settings(plan, planned)
    return _report_ending(run_attempt(plan, step, planned, store, inputs, load))


def _refuse_changed_code(planned: PlannedStep) -> None:
    """Refuse to run code that differs from the code in the key.

    Raises:
        UsageError: If the code changed since the plan was made.
    """
    current = code_identity.code_hash(planned.name)
    if current != planned.code:
        raise UsageError(
            f"the code changed since the plan was made ({planned.code[:12]} then, {current[:12]} now); make a new plan"
        )


def _print_settings(plan: Plan, planned: PlannedStep) -> None:
    """Print every setting of the step, each automatic choice with its reason."""
    step = graph.step(planned.name)
    reasons = plan.choice_reasons(step.section)
    progress.say(f"{planned.name}: {step.makes} {planned.key[:12]} of run {plan.run_id}")
    for name, value in planned.config.items():
        mark = "" if name in planned.identity else "  (operational)"
        reason = f"  auto: {reasons[name]}" if name in reasons else ""
        progress.say(f"  {step.section}.{name} = {value!r}{mark}{reason}")


def _report_ending(manifest: Manifest) -> Ending:
    """Print how the step ended, on one line, and return it."""
    ending = status.manifest_ending(manifest)
    line = progress.format_numbers(manifest.numbers)
    if ending.kind == Kind.REFUSED:
        print(f"{ending.sentence()}  [{line}]", file=sys.stderr, flush=True)
    else:
        progress.say(f"{manifest.step}: done: {line}")
    return ending
