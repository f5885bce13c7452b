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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.publish import base_model, contents
from components.publish.contents import Copy
from components.publish.documents import documents
from components.publish.facts import VersionFacts
from components.publish.model_signature import SIGNATURE_FILE, is_signature, sign_model
from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.core import aliases, hashing, json_depth
from qlora_retrain.core.errors import IntegrityError, QualityRefused, UsageError
from qlora_retrain.core.outcome import Number, StepResult
from qlora_retrain.pipeline import cost
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

_GENERATION_CONFIG = "generation_config.json"


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
    inputs = {"dataset": dataset, "adapter": adapter, "evaluation": evaluation, "model": model}
    copies = contents.choose(inputs, config.parts)
    written = _written_content(config, plan, store, inputs, copies)
    content = contents.content_hash(copies, written)

    version = versions.find_by_content(store, plan.line, content)
    if version is None:
        version = _publish(config, plan, store, inputs, copies, written, content, release)
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

    # A move stands though its audit entry failed. It is written here or by the next try, and after that by nobody.
    states = [(name, state) for name, state in moves.items() if state is not None]
    for name, state in states:
        audit.write_entry(store, plan.line, name, state)
    entries = [audit.entry_path(plan.line, name, state) for name, state in states]
    retention.retain(store, entries, config.retention_days)

    # Computed from the plan and not from what this attempt did, so that a retry after a crash reports the same numbers.
    costs = cost.read(inputs.values())
    numbers: dict[str, Number] = {
        "version": version.version,
        "published": version.provenance["run_id"] == plan.run_id,
        "moved": alias is not None and refusal is None and plan.target != version.version,
        "promoted_to": alias if refusal is None else None,
        "files": len(version.files),
        "size_mib": round(sum(f.size_bytes for f in version.files) / 2**20, 1),
        **{f"run_{name}": value for name, value in cost.total(cost.of_run(costs, plan.run_id).values()).items()},
        **{f"version_{name}": value for name, value in cost.total(costs.values()).items()},
    }
    (release / "release.json").write_text(json.dumps({"line": plan.line, **numbers}, indent=1) + "\n")
    return StepResult(numbers, refused=refusal)


def _written_content(
    config: PublishConfig, plan: Plan, store: Store, inputs: Mapping[str, Manifest], copies: Sequence[Copy]
) -> dict[str, str]:
    """Return the texts that are a part of the version's content and are not copied, by path."""
    settings = next((copy for copy in copies if copy.target == contents.ADAPTER_CONFIG), None)
    if settings is None:
        return {}
    document = _read_document(store, inputs[settings.artifact], settings.file.path)
    return {contents.ADAPTER_CONFIG: contents.adapter_config(document, base_model.find(config, plan))}


def _publish(
    config: PublishConfig,
    plan: Plan,
    store: Store,
    inputs: dict[str, Manifest],
    copies: Sequence[Copy],
    written: Mapping[str, str],
    content: str,
    release_folder: Path,
) -> Release:
    """Write a new version: its documents and copied files first, its manifest last."""
    # The plan's time and not the present time, so that a retry after a crash writes the same version.
    name = f"{plan.stamp}-{content[:12]}"
    folder = versions.version_folder(plan.line, name)
    is_alone = contents.is_adapter_alone(copies)
    texts = {**documents(_facts(config, plan, name, store, inputs, is_alone=is_alone)), **written}
    document_folder = release_folder / "version"
    for path, text in texts.items():
        (document_folder / path).parent.mkdir(parents=True, exist_ok=True)
        (document_folder / path).write_text(text, encoding="utf-8")

    # Copied inside the store, so that gigabytes do not pass through this machine. Another attempt at the same version
    # copies the same bytes, so overwriting is harmless.
    copies = [copy for copy in copies if copy.target not in written]
    store.copy([(f"{inputs[copy.artifact].prefix}/{copy.file.path}", f"{folder}/{copy.target}") for copy in copies])
    store.upload(document_folder, folder, texts)
    copied = [copy.copied for copy in copies]
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
            sequence=plan.sequence,
            numbers={artifact_name: dict(m.numbers) for artifact_name, m in inputs.items()},
            # What the steps cost is in cost.json.
            provenance={
                "run_id": plan.run_id,
                "steps": {n: {k: v for k, v in m.provenance.items() if k != cost.COSTS} for n, m in inputs.items()},
            },
        ),
    )


def _facts(
    config: PublishConfig, plan: Plan, name: str, store: Store, inputs: Mapping[str, Manifest], *, is_alone: bool
) -> VersionFacts:
    """Return what the version's documents are written from."""
    generation = _read_document(store, inputs["model"], _GENERATION_CONFIG, is_optional=True)
    stop_ids = generation.get("eos_token_id")
    return VersionFacts(
        config=config,
        plan=plan,
        version=name,
        verdict=_read_document(store, inputs["evaluation"], "evaluation.json"),
        numbers={artifact_name: dict(m.numbers) for artifact_name, m in inputs.items()},
        certificate=_read_document(store, inputs["model"], "certificate.json"),
        profile=_read_document(store, inputs["dataset"], "profile.json", is_optional=True),
        stop_ids=stop_ids if isinstance(stop_ids, list) else [] if stop_ids is None else [stop_ids],
        cost=cost.as_document(cost.read(inputs.values()), plan.run_id),
        base_id=base_model.find(config, plan),
        is_alone=is_alone,
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


def _read_document(store: Store, source: Manifest, path: str, *, is_optional: bool = False) -> dict[str, Any]:
    """Return a document of an artifact after checking its hash, because the version repeats what it says.

    Of an optional one that is not there, or that is no object, an empty one is returned.
    """
    expected = next((f.sha256 for f in source.files if f.path == path), None)
    if expected is None and is_optional:
        return {}
    data = store.read(f"{source.prefix}/{path}").data
    if hashing.sha256_bytes(data) != expected:
        raise artifact.corruption_error(store, source, f"{path}: its sha256 differs from the manifest's")
    try:
        document = json_depth.loads(data)
    except ValueError as error:
        raise artifact.corruption_error(store, source, f"{path}: is no JSON: {error}") from error
    if isinstance(document, dict):
        return document
    if is_optional:
        return {}
    raise artifact.corruption_error(store, source, f"{path}: expected a JSON object")


def _copy_error(
    store: Store, inputs: Mapping[str, Manifest], copies: Sequence[Copy], file: File, fault: str
) -> IntegrityError:
    """Return the error for a file of the version that differs from the artifact's manifest."""
    for copy in copies:
        if copy.target == file.path:
            text = f"{copy.file.path}, copied to be published: {fault}"
            return artifact.corruption_error(store, inputs[copy.artifact], text)
    return IntegrityError(f"{store.uri}: {file.path}: {fault}; run the step again")
