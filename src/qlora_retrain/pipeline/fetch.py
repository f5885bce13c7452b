"""Fetch what a step reads: manifests from the store, folders through the node cache, which checks every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_retrain.config import platform
from qlora_retrain.core import graph, safety
from qlora_retrain.core.errors import Cause, IntegrityError, TryAgain, is_refusal
from qlora_retrain.pipeline import base_model, evaluation_history
from qlora_retrain.pipeline.model_folder import ModelFolder
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.pipeline.planned_steps import FILE_SETS, PlannedStep
from qlora_retrain.storage import artifact, cache, registry, sources
from qlora_retrain.storage.artifact import File, Manifest
from qlora_retrain.storage.store import NotFound, Store


def input_manifests(plan: Plan, step: graph.Step, store: Store) -> dict[str, Manifest]:
    """Return the manifests of the artifacts that the step reads. Some may be missing where one is a refusal.

    Raises:
        TryAgain: If one is missing, and none of the others is a refusal.
    """
    makers = [(item.name, maker) for item in step.reads if (maker := graph.producer(item.name))]
    by_name = {name: artifact.find_manifest(store, name, plan.step(maker.name).key) for name, maker in makers}
    manifests = {name: manifest for name, manifest in by_name.items() if manifest is not None}

    # A refusal among the inputs decides, whatever else is missing: the step will not run.
    if any(is_refusal(manifest.exit_code) for manifest in manifests.values()):
        return manifests

    for name, maker in makers:
        if name not in manifests:
            message = f"its input {name} is not in the store: not made yet, or removed since; run {maker.name} first"
            raise TryAgain(message, cause=Cause.INPUT_MISSING)
    return manifests


def refuse_mixed_inputs(store: Store, inputs: Mapping[str, Manifest]) -> None:
    """Refuse inputs of which one was dropped and made again with other bytes after another had been made from it.

    Raises:
        IntegrityError: For such inputs; the message names both.
    """
    for manifest in inputs.values():
        for name, content_hash in manifest.read.items():
            if name in inputs and inputs[name].content_hash != content_hash:
                raise artifact.corruption_error(store, manifest, f"was made from another {name} than the one there now")


def fetch_input(
    plan: Plan, planned: PlannedStep, store: Store, item: graph.Input, inputs: Mapping[str, Manifest]
) -> Path | None:
    """Return a local folder with one input, or None for an optional source that is absent.

    Raises:
        TryAgain: If the artifact was dropped while it was fetched.
        IntegrityError: If a file is missing or differs from its manifest.
    """
    # The plan has None for an optional source that the line does not set.
    key = planned.inputs[item.name]
    if key is None:
        return None
    if item.name in inputs:
        return fetch_artifact(store, inputs[item.name])
    if item.name in graph.VERSION_PARTS:
        return _fetch_version(plan, store, item.name)
    if item.name == graph.HISTORY:
        return _fetch_history(plan, store)
    if item.name == graph.EARLIER_ADAPTERS:
        return _fetch_earlier_adapters(plan, store, key)
    # What is left is a source, whose files were pinned by their hashes when the plan was made.
    source = plan.sources[item.name]
    assert source is not None
    access = platform.load().access(plan.root)
    sources.refuse_closed(source, access)  # whatever the cache has
    subset = sources.list_commit(item.name, source).subset(FILE_SETS[item.files])
    folder = cache.fetch(item.name, key, lambda folder: sources.fetch(subset, folder, access), subset.as_files())
    if item.name == sources.BASE:
        # Before any library opens a file of it.
        safety.refuse_unsafe(folder)
        if source.is_commit:
            _refuse_unfit_base(plan, item, folder)
    return folder


def _refuse_unfit_base(plan: Plan, item: graph.Input, folder: Path) -> None:
    """Ask of a commit's files what the plan asks of files that it can list.

    Raises:
        UsageError: If the line cannot use the base model.
    """
    settings = {graph.step(planned.name).section: planned.config for planned in plan.steps}
    model_folder = ModelFolder.from_path(folder, has_weights=item.files == "all")
    base_model.refuse_unfit(model_folder, base_model.Demands.from_sections(**settings))


def fetch_artifact(store: Store, manifest: Manifest) -> Path:
    """Return a local folder with the files of an artifact, each checked against its manifest."""
    # The cache is shared by all runs on this node; it verifies every file before a step sees it.
    try:
        return cache.fetch(
            manifest.artifact,
            manifest.key,
            lambda folder: _download(store, manifest.prefix, manifest.files, folder),
            manifest.files,
        )
    except (IntegrityError, NotFound) as error:
        # A dropped artifact will be made again. If its manifest is still there, the store has lost a file.
        if artifact.find_manifest(store, manifest.artifact, manifest.key) != manifest:
            message = f"{manifest.artifact} was dropped while it was fetched; run again"
            raise TryAgain(message, cause=Cause.INPUT_MISSING) from error
        fault = f"{error}: missing" if isinstance(error, NotFound) else str(error)
        raise artifact.corruption_error(store, manifest, fault) from error


def _download(store: Store, prefix: str, files: Sequence[File], folder: Path) -> None:
    """Copy files from a folder of the store.

    Raises:
        IntegrityError: If one of them is missing or has another size, before it fills the disk.
    """
    if fault := artifact.size_fault(store, prefix, files):
        raise IntegrityError(fault)
    store.download(prefix, [file.path for file in files], folder)


def _fetch_version(plan: Plan, store: Store, name: str) -> Path:
    """Return a local folder with the parts of a published version that a step reads."""
    pinned = plan.pinned_version(name)
    assert pinned is not None
    release = registry.read_release(store, plan.line, pinned.version, sha256=pinned.manifest_sha256)
    parts = graph.VERSION_PARTS[name]
    # Only the form that is judged: further exports may be as large, and no step of ours runs them. An adapter is
    # fetched where there is nothing else, or nothing else is asked for.
    has_model = "model" in parts and not release.is_adapter_alone
    others = ("model/exports/", "adapter/") if has_model else ("model/exports/",)
    files = tuple(file for file in release.parts(*parts) if not file.path.startswith(others))
    prefix = registry.version_folder(plan.line, pinned.version)

    try:
        return cache.fetch(name, pinned.manifest_sha256, lambda folder: _download(store, prefix, files, folder), files)
    except (IntegrityError, NotFound) as error:
        role = {"champion": "the version in production", "anchor": "the line's best version"}.get(name, pinned.version)
        raise IntegrityError(
            f"{store.uri}/{prefix}: {error}: {role} is broken; promote or roll back to another"
        ) from error


def _fetch_earlier_adapters(plan: Plan, store: Store, key: str) -> Path:
    """Return a local folder with a folder for each earlier version that the plan pins: its adapter's files."""
    files: dict[str, tuple[File, ...]] = {}
    for pinned in plan.earlier_adapters:
        release = registry.read_release(store, plan.line, pinned.version, sha256=pinned.manifest_sha256)
        files[pinned.version] = release.parts(graph.ADAPTER_PART)

    def download(folder: Path) -> None:
        for version, version_files in files.items():
            (folder / version).mkdir()
            _download(store, registry.version_folder(plan.line, version), version_files, folder / version)

    promised = [
        file.model_copy(update={"path": f"{version}/{file.path}"})
        for version, version_files in files.items()
        for file in version_files
    ]
    try:
        return cache.fetch(graph.EARLIER_ADAPTERS, key, download, tuple(promised))
    except (IntegrityError, NotFound) as error:
        raise IntegrityError(
            f"{store.uri}: {error}: an earlier version's adapter is broken; set merge.soup to a smaller number, or null"
        ) from error


def _fetch_history(plan: Plan, store: Store) -> Path:
    """Return a local folder with the line's evaluation history."""
    history = plan.history
    assert history is not None

    def download(folder: Path) -> None:
        data = evaluation_history.read_pinned(store, plan.line, history)
        (folder / graph.EVALUATED_PROMPTS).write_bytes(data)

    return cache.fetch(graph.HISTORY, history.sha256, download, (evaluation_history.as_file(history),))
