"""Publish an immutable version and move its aliases.

Reads the manifests of dataset, adapter, evaluation and model, and copies their files inside the store, files first and
`manifest.json` last. Then it moves `latest` forward, and moves `publish.promote_to` if that alias still names what it
named when the plan was made. With `publish.approval` it moves `staging` instead, and a person decides on production.
Makes `release`: `release.json`, which says what was published and which aliases moved.
Refuses (11) content that a rollback has rejected, (12) what a lab has trained, and (13) a file that this project does
not write or that asks for code; ends with 75 where an alias has moved meanwhile.

Command: `python -m components.publish --plan URI`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.publish.documents import model_card, recipe, sbom
from components.publish.markdown import inline, licence_text
from components.publish.model_signature import SIGNATURE_FILE, is_signature, sign_model
from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.core import aliases, graph, hashing
from qlora_retrain.core.errors import IntegrityError, QualityRefused, UsageError
from qlora_retrain.core.outcome import Number, StepResult
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import (
    artifact,
    audit,
    keys,
    registry,
    rejections,
    release_files,
    retention,
    version_repair,
    versions,
)
from qlora_retrain.storage.artifact import File, Manifest
from qlora_retrain.storage.keys import Keyring
from qlora_retrain.storage.pinned_source import PinnedSource
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import AlreadyExists, Store

# The files of each artifact that have another path in the version. These paths are part of every published version.
_RENAMED_FILES = {
    "dataset": {"profile.json": "data/profile.json", "report.html": "reports/data.html"},
    "adapter": {
        "training.json": "training/training.json",
        "loss.jsonl": "training/loss.jsonl",
        "events.out.tfevents.0.train": "training/events.out.tfevents.0.train",
        "report.html": "reports/training.html",
    },
    "evaluation": {"evaluation.json": "evaluation/evaluation.json", "report.html": "reports/evaluation.html"},
    "model": {"certificate.json": "evaluation/certificate.json", "report.html": "reports/merge.html"},
}
# The other files of these two artifacts go into a folder of the same name, and their hash is the version's content. The
# other files of the remaining two artifacts are not published.
_CONTENT_ARTIFACTS = ("adapter", "model")
_CONTENT_FOLDERS = tuple(f"{name}/" for name in _CONTENT_ARTIFACTS)
# Below `model`: the adapter that was merged, where it is not the one that was trained. A version has it in its place.
_MERGED_ADAPTER = "adapter/"


def run(
    config: PublishConfig,
    dataset: Manifest,
    adapter: Manifest,
    evaluation: Manifest,
    model: Manifest,
    release: Path,
    *,
    plan: Plan,
    store: Store,
) -> StepResult:
    """Publish the model that passed both gates: the evaluation and the certificate."""
    if dataset.config.get("judge_fraction") is not None:
        raise UsageError(
            f"run {plan.run_id} is a lab's: its model was judged by training rows, so it is not published; set what "
            "the lab recommends in the line's file, and run the line"
        )
    # Only the adapter and the model are a version's content, so a new report of the same model makes no new version.
    inputs = {"dataset": dataset, "adapter": adapter, "evaluation": evaluation, "model": model}
    copies = _with_merged_adapter({name: _targets(name, manifest) for name, manifest in inputs.items()})
    content = hashing.content_hash(
        (target, file.sha256)
        for name in _CONTENT_ARTIFACTS
        for file, target in copies[name]
        if target.startswith(_CONTENT_FOLDERS)
    )

    version = versions.find_by_content(store, plan.line, content)
    if version is None:
        version = _publish(config, plan, store, inputs, copies, content, release)
    else:
        version = version_repair.read_remembered(store, plan.line, version.version)
        version_repair.verify_or_repair(store, version)

    # Before an alias moves: a role that may not do it publishes nothing.
    folder = versions.version_folder(plan.line, version.version)
    files = ["manifest.json", *(file.path for file in version.files)]
    retention.retain(store, [f"{folder}/{path}" for path in files], config.retention_days)

    refusal, moves = None, {}
    reason = f"published by run {plan.run_id}"
    moves[aliases.LATEST] = registry.move_alias(
        store, plan.line, aliases.LATEST, version, reason=reason, is_verified=True
    )

    alias = aliases.alias_of_run(config.promote_to, has_approval=config.approval)
    if alias is not None:
        try:
            # Nobody is asked about what a rollback of production has rejected.
            if config.approval:
                production, _ = registry.read_alias(store, plan.line, aliases.PRODUCTION)
                rejections.refuse(store, plan.line, aliases.PRODUCTION, production, version)
            reason = f"passed both gates in run {plan.run_id}"
            moves[alias] = registry.move_alias(
                store, plan.line, alias, version, reason=reason, expected=plan.target, is_verified=True
            )
        except QualityRefused as problem:
            refusal = problem

    entries = [audit.entry_path(plan.line, name, state) for name, state in moves.items() if state is not None]
    retention.retain(store, entries, config.retention_days)

    # Computed from the plan and not from what this attempt did, so that a retry after a crash reports the same numbers.
    numbers: dict[str, Number] = {
        "version": version.version,
        "published": version.provenance["run_id"] == plan.run_id,
        "moved": alias is not None and refusal is None and plan.target != version.version,
        "promoted_to": alias if refusal is None else None,
        "files": len(version.files),
        "size_mib": round(sum(f.size_bytes for f in version.files) / 2**20, 1),
    }
    (release / "release.json").write_text(json.dumps({"line": plan.line, **numbers}, indent=1) + "\n")
    return StepResult(numbers, refused=refusal)


def _targets(name: str, manifest: Manifest) -> list[tuple[File, str]]:
    """Return (file, path in the version) for each file of an artifact that is published."""
    renamed = _RENAMED_FILES[name]
    # Where all weights trained, `model` has the same weights, and a version has them once.
    is_whole_model = name == "adapter" and any(file.path == "config.json" for file in manifest.files)
    if name in _CONTENT_ARTIFACTS and not is_whole_model:
        return [
            (f, f.path if f.path.startswith(_MERGED_ADAPTER) else renamed.get(f.path, f"{name}/{f.path}"))
            for f in manifest.files
        ]
    return [(f, renamed[f.path]) for f in manifest.files if f.path in renamed]


def _with_merged_adapter(copies: dict[str, list[tuple[File, str]]]) -> dict[str, list[tuple[File, str]]]:
    """Leave out the files of the trained adapter that the merge replaced."""
    replaced = {target for file, target in copies["model"] if file.path.startswith(_MERGED_ADAPTER)}
    return {**copies, "adapter": [pair for pair in copies["adapter"] if pair[1] not in replaced]}


def _publish(
    config: PublishConfig,
    plan: Plan,
    store: Store,
    inputs: dict[str, Manifest],
    copies: dict[str, list[tuple[File, str]]],
    content: str,
    release_folder: Path,
) -> Release:
    """Write a new version: its documents and copied files first, its manifest last."""
    # The plan's time and not the present time, so that a retry after a crash writes the same version.
    name = f"{plan.stamp}-{content[:12]}"
    folder = versions.version_folder(plan.line, name)
    verdict = _read_document(store, inputs["evaluation"], "evaluation.json")
    certificate = _read_document(store, inputs["model"], "certificate.json")
    numbers = {artifact_name: dict(m.numbers) for artifact_name, m in inputs.items()}
    is_alone = any(target == graph.BASE_REFERENCE for _, target in copies["model"])

    documents = {
        "README.md": model_card(config, plan, name, verdict, numbers, certificate, is_alone=is_alone),
        "recipe.json": json.dumps(recipe(plan), indent=1) + "\n",
        "sbom.json": json.dumps(sbom(plan, name), indent=1) + "\n",
        "LICENCE.md": (
            f"The model is published under: {inline(licence_text(config))}. Its software is listed in `sbom.json`.\n"
        ),
    }
    document_folder = release_folder / "version"
    document_folder.mkdir()
    for path, text in documents.items():
        (document_folder / path).write_text(text, encoding="utf-8")

    # Copied inside the store, so that gigabytes do not pass through this machine. Another attempt at the same version
    # copies the same bytes, so overwriting is harmless.
    store.copy(
        [
            (f"{inputs[artifact_name].prefix}/{file.path}", f"{folder}/{target}")
            for artifact_name, pairs in copies.items()
            for file, target in pairs
        ]
    )
    store.upload(document_folder, folder, documents)
    copied = [f.model_copy(update={"path": target}) for pairs in copies.values() for f, target in pairs]
    files = (*copied, *artifact.list_files(document_folder))
    keyring = keys.find_keyring(store.uri)
    if keyring is not None:
        _write_signature(store, keyring, keys.publish_role(plan.line), folder, document_folder, files)
        files = (*copied, *artifact.list_files(document_folder))
    files = tuple(sorted(files, key=lambda f: f.path))
    # Hashed where consumers will read them, since an artifact may have changed after it was judged.
    if difference := versions.first_fault(store, folder, files):
        raise _copy_error(store, inputs, copies, *difference)
    release_files.refuse_unsafe(store, folder, files)

    base = plan.sources["base_model"]
    assert base is not None
    return versions.complete_version(
        store,
        Release(
            line=plan.line,
            version=name,
            content_hash=content,
            created_at=plan.created_at,
            files=files,
            adapter_key=inputs["adapter"].key,
            judgement=plan.judgement,
            anchor=_anchor(plan, name, inputs["model"]),
            keys={s.name: s.key for s in plan.steps},
            base=_base(base, is_alone=is_alone),
            numbers=numbers,
            sequence=plan.sequence,
            provenance={"run_id": plan.run_id, "steps": {n: m.provenance for n, m in inputs.items()}},
        ),
    )


def _base(base: PinnedSource, *, is_alone: bool) -> dict[str, Any]:
    """Return the pins of the base; where the version is an adapter alone, also where everybody finds that base."""
    pins: dict[str, Any] = {"files": {file.path: file.pin for file in base.files}}
    return pins | ({"source": base.uri} if is_alone and base.is_commit else {})


def _write_signature(
    store: Store, keyring: Keyring, role: str, folder: str, document_folder: Path, files: Sequence[File]
) -> None:
    """Write `model.sig` to the version and to the folder of its documents."""
    path, local = f"{folder}/{SIGNATURE_FILE}", document_folder / SIGNATURE_FILE
    name = folder.rpartition("/")[2]
    local.write_text(sign_model(keyring, role, name, files), encoding="utf-8")
    try:
        store.write_if_absent(path, local.read_bytes())
    except AlreadyExists as error:
        # No two signatures are the same. That of another attempt stays, since its manifest may name it already.
        if is_signature(error.stored.data, keyring, role, name, files):
            local.write_bytes(error.stored.data)
        else:
            store.upload(document_folder, folder, [SIGNATURE_FILE])


def _anchor(plan: Plan, version: str, model: Manifest) -> str:
    """Return the line's best version from now on: this one only if its merged form was surely better than the best."""
    if model.numbers.get("best") == "anchor" and plan.anchor:
        return plan.anchor.version
    return plan.champion.version if model.numbers.get("best") == "champion" and plan.champion else version


def _read_document(store: Store, source: Manifest, path: str) -> dict[str, Any]:
    """Return a document of an artifact after checking its hash, because the model card repeats its numbers."""
    data = store.read(f"{source.prefix}/{path}").data
    expected = next(f.sha256 for f in source.files if f.path == path)
    if hashing.sha256_bytes(data) != expected:
        raise artifact.corruption_error(store, source, f"{path}: its sha256 differs from the manifest's")
    document: dict[str, Any] = json.loads(data)
    return document


def _copy_error(
    store: Store, inputs: dict[str, Manifest], copies: dict[str, list[tuple[File, str]]], file: File, fault: str
) -> IntegrityError:
    """Return the error for a file of the version that differs from the artifact's manifest."""
    for name, pairs in copies.items():
        for source, target in pairs:
            if target == file.path:
                return artifact.corruption_error(store, inputs[name], f"{source.path}, copied to be published: {fault}")
    return IntegrityError(f"{store.uri}: {file.path}: {fault}; run the step again")
