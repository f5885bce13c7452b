"""Run one step of a plan: the same in a subprocess, a container, a pod and KFP; `program` is its command line.

Read the plan → made already? return its outcome → fetch inputs into the node cache → call the step → upload, manifest
last → one line of numbers. Exit codes are those of `errors.py`.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_retrain.config import sections
from qlora_retrain.config.fields import Section
from qlora_retrain.core import graph, progress, signals
from qlora_retrain.core.errors import OF_THE_GPU, Exit, IntegrityError, Problem, TryAgain, UsageError, describe, refusal
from qlora_retrain.core.outcome import Number, Report
from qlora_retrain.pipeline import checkpoint_sync, code_identity, runlog
from qlora_retrain.pipeline.plan import Plan, PlannedStep
from qlora_retrain.storage import artifact, cache, open_store, sources
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.store import NotFound, Store

Run = Callable[..., Report]

CONFIGS: Mapping[str, type[Section]] = {
    "data": sections.DataConfig,
    "quantize": sections.QuantizeConfig,
    "train": sections.TrainConfig,
    "evaluate": sections.EvaluateConfig,
    "merge": sections.MergeConfig,
    "publish": sections.PublishConfig,
}


def execute(plan: Plan, step_name: str, load: Callable[[], Run]) -> int:
    """Run a step and return its exit code; whatever happens is said, and kept in the run's folder."""
    step = graph.step(step_name)
    signals.install(polite=step.scratch)
    store = open_store(plan.root)
    with runlog.kept(store, plan.run_id, step_name):
        try:
            return _execute(plan, step, store, load)
        except signals.Stopped as stopped:
            return ended(step_name, stopped.exit_code, str(stopped))
        except Exception as error:  # noqa: BLE001 - the one place where our own bugs become an exit code
            if signals.requested() and not isinstance(error, TryAgain):
                # The signal's exception came up inside a library, which made an error of its own of it.
                return ended(step_name, Exit.TRY_AGAIN, f"stopped; run the same command again to go on ({error})")
            if isinstance(error, Problem):
                return ended(step_name, error.exit_code, str(error))
            if _is_disk_full(error):
                return ended(step_name, Exit.TRY_AGAIN, f"disk full: {error}; what was half-written is gone")
            if _is_out_of_gpu_memory(error):
                why = f"{OF_THE_GPU}: take a smaller batch, shorter rows or a GPU with more; {error}"
                return ended(step_name, Exit.OUT_OF_MEMORY, why)
            if _is_out_of_memory(error):
                return ended(step_name, Exit.OUT_OF_MEMORY, f"out of memory: {error}")
            traceback.print_exc()
            return ended(step_name, Exit.BUG, f"{type(error).__name__}: {error}")


def _is_disk_full(error: Exception) -> bool:
    """Also as safetensors and a process that trains say it: in the text of an error of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(n) in str(error) for n in full)


def _is_out_of_gpu_memory(error: Exception) -> bool:
    """As torch says it, without importing torch; or a step that passes on what torch and CUDA's libraries said."""
    by_cuda = any(word in str(error) for word in ("CUDA", "_STATUS_ALLOC_FAILED"))
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, MemoryError) and by_cuda)


def _is_out_of_memory(error: Exception) -> bool:
    """The host's; also as torch says it."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def found(plan: Plan, step_name: str) -> int | None:
    """The exit code of what is made already: 0, 10 or 11; None if the step must run.

    Raises:
        IntegrityError: If the artifact is there but not as its manifest promises.
    """
    if plan.unchanged:
        return int(Exit.DONE)
    made = manifest(plan, step_name)
    if made is None:
        return None
    artifact.check(open_store(plan.root), made)
    return made.exit_code


def manifest(plan: Plan, step_name: str) -> Manifest | None:
    """The manifest of what a step makes in this plan, or None while there is none."""
    step = graph.step(step_name)
    return artifact.find(open_store(plan.root), step.makes, plan.step(step_name).key)


def refused_before(plan: Plan, step_name: str) -> str:
    """What a runtime says of an artifact that it found refused: the line that the step itself ended with, as before."""
    made = manifest(plan, step_name)
    assert made is not None
    return _ending(step_name, made.exit_code, f"as before: {made.reason}")


def summary(plan: Plan, step_name: str) -> dict[str, Number]:
    """The numbers of what a step made; empty while it has made nothing."""
    made = manifest(plan, step_name)
    return dict(artifact.summary(made)) if made else {}


def _execute(plan: Plan, step: graph.Step, store: Store, load: Callable[[], Run]) -> int:
    planned = plan.step(step.name)
    if plan.unchanged:
        progress.say(f"{step.name}: unchanged: production is already {plan.unchanged}, made by this recipe")
        return Exit.DONE
    made = artifact.find(store, step.makes, planned.key)
    if made is not None:
        artifact.check(store, made)
        progress.say(f"{step.name}: {step.makes} {planned.key[:12]} was made already by attempt {made.attempt}")
        return _outcome(step, made)
    code_now = code_identity.identity(step.name)
    if code_now != planned.code:
        raise UsageError(
            f"{step.name}: the code changed since the plan was made ({planned.code[:12]} then, {code_now[:12]} now); "
            "plan again"
        )
    inputs = _input_manifests(plan, step, store)
    for name, input_manifest in inputs.items():
        if input_manifest.outcome != "done":
            progress.say(f"{step.name}: not run: its input {name} was refused: {input_manifest.reason}")
            return input_manifest.exit_code
    _same_inputs(store, inputs)
    _print_settings(plan, planned)
    manifest = _attempt(plan, step, planned, store, inputs, load)
    return _outcome(step, manifest)


def _attempt(
    plan: Plan,
    step: graph.Step,
    planned: PlannedStep,
    store: Store,
    inputs: Mapping[str, Manifest],
    load: Callable[[], Run],
) -> Manifest:
    """Run the step in a folder of its own and complete its artifact."""
    attempt, started = artifact.new_attempt(), datetime.now(UTC)
    run = load()
    config = CONFIGS[step.section].model_validate(planned.config).with_reasons(_reasons(plan, step.section))
    with cache.work_folder() as work:
        output = work / step.makes
        output.mkdir()
        arguments: dict[str, Any] = {"config": config, step.makes: output}
        if step.store:
            for made in inputs.values():
                artifact.check(store, made)
            arguments |= {**inputs, "plan": plan, "store": store}
        else:
            arguments |= {i.name: _fetched(plan, planned, store, i, inputs) for i in step.reads}
        clock = time.monotonic()
        with _scratch(store, step, planned.key, attempt, work) as extra:
            report = _call(run, step, {**arguments, **extra})
        refused = report.refused
        manifest = Manifest(
            artifact=step.makes,
            key=planned.key,
            step=step.name,
            attempt=attempt,
            outcome="refused" if refused else "done",
            exit_code=refused.exit_code if refused else Exit.DONE,
            reason=str(refused) if refused else None,
            numbers={**report.numbers, "seconds": round(time.monotonic() - clock, 1)},
            files=artifact.list_files(output),
            inputs=planned.inputs,
            read={name: made.content_hash for name, made in inputs.items()},
            config=planned.identity,
            code=planned.code,
            provenance=_provenance(plan, started),
        )
        manifest = artifact.complete(store, output, manifest)
    if step.scratch:
        checkpoint_sync.remove(store, f"scratch/{step.name}/{planned.key}")
    return manifest


@contextlib.contextmanager
def _scratch(store: Store, step: graph.Step, key: str, attempt: str, work: Path) -> Iterator[dict[str, Path]]:
    """The extra argument of a step with scratch: restored before, mirrored meanwhile and after."""
    if not step.scratch:
        yield {}
        return
    folder = work / "scratch"
    folder.mkdir()
    prefix = f"scratch/{step.name}/{key}"
    restored = checkpoint_sync.restore(store, prefix, folder)
    mirror = checkpoint_sync.Mirror(store, prefix, attempt, folder)
    mirror.start(restored)
    try:
        yield {"scratch": folder}
    except BaseException:
        mirror.stop(sync=True)
        raise
    mirror.stop(sync=False)


def _call(run: Run, step: graph.Step, arguments: Mapping[str, Any]) -> Report:
    """Call a step's `run`, whose parameters must be the graph's names."""
    wanted, has = set(arguments), set(inspect.signature(run).parameters)
    if wanted != has:
        raise TypeError(
            f"components.{step.name}.step.run: the graph wants ({', '.join(sorted(wanted))}), "
            f"it takes ({', '.join(sorted(has))})"
        )
    report = run(**arguments)
    if not isinstance(report, Report):
        raise TypeError(f"components.{step.name}.step.run: wanted a Report, found {type(report).__name__}")
    return report


def _same_inputs(store: Store, inputs: Mapping[str, Manifest]) -> None:
    """Refuse inputs that were not made from each other: one was dropped and made again, in other bytes."""
    for made in inputs.values():
        for name, content in made.read.items():
            if name in inputs and inputs[name].content_hash != content:
                raise artifact.corrupt(store, made, f"was made from another {name} than the one there now")


def _input_manifests(plan: Plan, step: graph.Step, store: Store) -> dict[str, Manifest]:
    """The manifest of every artifact that the step reads: all of them, or at least one that was refused.

    Raises:
        TryAgain: If one is not made, and none that is was refused.
    """
    makers = [(item.name, maker) for item in step.reads if (maker := graph.maker(item.name))]
    found = {name: artifact.find(store, name, plan.step(maker.name).key) for name, maker in makers}
    manifests = {name: made for name, made in found.items() if made is not None}
    if not any(refusal(made.exit_code) for made in manifests.values()):
        for name, maker in makers:
            if name not in manifests:
                raise TryAgain(f"{step.name}: its input {name} is not made (or was collected); run {maker.name} first")
    return manifests


def _fetched(
    plan: Plan, planned: PlannedStep, store: Store, item: graph.Input, inputs: Mapping[str, Manifest]
) -> Path | None:
    """A local folder with one input, or None for an optional source that is absent."""
    key = planned.inputs[item.name]
    made = inputs.get(item.name)
    if key is None:
        return None
    if made is not None:
        try:
            return cache.fetch(
                item.name,
                key,
                lambda folder: store.download(made.prefix, [f.path for f in made.files], folder),
                made.files,
            )
        except IntegrityError as error:
            raise artifact.corrupt(store, made, str(error)) from error
        except NotFound as error:
            if artifact.find(store, item.name, key) != made:
                raise TryAgain(f"{item.name} was dropped while it was fetched; run again") from error
            raise artifact.corrupt(store, made, f"{error}: missing") from error
    if item.name in graph.VERSIONS:
        return _fetched_version(plan, store, item.name)
    source = plan.sources[item.name]
    assert source is not None
    chosen = source.subset(item.only)
    return cache.fetch(item.name, key, lambda folder: sources.fetch(chosen, folder), None)


def _fetched_version(plan: Plan, store: Store, name: str) -> Path:
    """A folder with the parts of a published version that a step reads."""
    from qlora_retrain.storage import registry

    pinned = plan.pinned_version(name)
    assert pinned is not None
    release = registry.read_release(store, plan.line, pinned.version, sha256=pinned.manifest_sha256)
    # The form that is judged; a version's further exports are never run here, and may be as large.
    files = tuple(f for f in release.parts(*graph.VERSIONS[name]) if not f.path.startswith("model/exports/"))
    prefix = registry.version_folder(plan.line, pinned.version)
    try:
        return cache.fetch(
            name, pinned.manifest_sha256, lambda f: store.download(prefix, [x.path for x in files], f), files
        )
    except (IntegrityError, NotFound) as error:
        which = {"champion": "the version in production", "anchor": "the line's best version"}.get(name, pinned.version)
        raise IntegrityError(
            f"{store.uri}/{prefix}: {error}: {which} is broken; promote or roll back to another"
        ) from error


def _reasons(plan: Plan, section: str) -> dict[str, str]:
    """Why the automatic choices of a section were made, by field."""
    return {c.field.partition(".")[2]: c.reason for c in plan.choices if c.field.partition(".")[0] == section}


def _print_settings(plan: Plan, planned: PlannedStep) -> None:
    """The resolved settings, each automatic choice with its reason."""
    section = graph.step(planned.name).section
    reasons = _reasons(plan, section)
    progress.say(f"{planned.name}: {graph.step(planned.name).makes} {planned.key[:12]} of run {plan.run_id}")
    for name, value in planned.config.items():
        reason = reasons.get(name)
        kind = "" if name in planned.identity else "  (operational)"
        progress.say(f"  {section}.{name} = {value!r}{kind}" + (f"  auto: {reason}" if reason else ""))


def _provenance(plan: Plan, started: datetime) -> dict[str, Any]:
    return {
        "run_id": plan.run_id,
        "started_at": started.isoformat(timespec="seconds"),
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "image": os.environ.get("QLORA_RETRAIN_IMAGE"),
    }


def _outcome(step: graph.Step, manifest: Manifest) -> int:
    """Say how it ended, on one line, and return the exit code."""
    line = progress.one_line(manifest.numbers)
    if refusal(manifest.exit_code):
        return ended(step.name, manifest.exit_code, f"{manifest.reason}  [{line}]")
    progress.say(f"{step.name}: done: {line}")
    return manifest.exit_code


def ended(step_name: str, exit_code: int, why: str) -> int:
    """Say how a step ended, where errors go, and return its exit code."""
    print(_ending(step_name, exit_code, why), file=sys.stderr, flush=True)
    return int(exit_code)


def _ending(step_name: str, exit_code: int, why: str) -> str:
    return f"{step_name}: {describe(exit_code)} ({int(exit_code)}): {why}"
