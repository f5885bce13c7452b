"""Publish an immutable version and move its aliases.

Reads the manifests of dataset, adapter, evaluation and model; copies their files inside the store, files first and
`manifest.json` last; then offers `latest` and moves `publish.promote_to` if it still names what the verdict compared
with. Makes `release`: what was published, and which aliases moved.
Refuses (11) content that a rollback has rejected; (75) an alias that moved meanwhile.

Command: `python -m components.publish --plan URI`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.publish.documents import model_card, recipe, sbom
from qlora_retrain.config.sections import PublishConfig
from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, QualityRefused
from qlora_retrain.core.outcome import Number, Report
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, registry
from qlora_retrain.storage.artifact import File, Manifest
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

# What of each artifact a consumer gets, and where; what is not named here stays in the artifact.
_APART = {
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
_WHOLE = ("adapter", "model")  # the rest of these two goes below a folder of the same name, and is the content


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
) -> Report:
    """Publish what both gates let through."""
    inputs = {"dataset": dataset, "adapter": adapter, "evaluation": evaluation, "model": model}
    copies = {name: _targets(name, manifest) for name, manifest in inputs.items()}
    content = hashing.content_hash(
        (target, file.sha256) for name in _WHOLE for file, target in copies[name] if target.startswith(f"{name}/")
    )
    version = registry.find_content(store, plan.line, content)
    if version is None:
        version = _publish(config, plan, store, inputs, copies, content, release)
    refused = None
    registry.move(store, plan.line, registry.LATEST, version, reason=f"published by run {plan.run_id}")
    if config.promote_to is not None:
        try:
            reason = f"passed both gates in run {plan.run_id}"
            registry.move(store, plan.line, config.promote_to, version, reason=reason, expected=plan.target)
        except QualityRefused as problem:
            refused = problem
    # Told from the plan, so that a retry after a crash says the same as the try that did the work.
    numbers: dict[str, Number] = {
        "version": version.version,
        "published": version.provenance["run_id"] == plan.run_id,
        "moved": config.promote_to is not None and refused is None and plan.target != version.version,
        "promoted_to": config.promote_to if refused is None else None,
        "files": len(version.files),
        "size_mib": round(sum(f.size_bytes for f in version.files) / 2**20, 1),
    }
    (release / "release.json").write_text(json.dumps({"line": plan.line, **numbers}, indent=1) + "\n")
    return Report(numbers, refused=refused)


def _targets(name: str, manifest: Manifest) -> list[tuple[File, str]]:
    """(file, path in the version) of everything that is published of an artifact."""
    apart = _APART[name]
    if name in _WHOLE:
        return [(f, apart.get(f.path, f"{name}/{f.path}")) for f in manifest.files]
    return [(f, apart[f.path]) for f in manifest.files if f.path in apart]


def _publish(
    config: PublishConfig,
    plan: Plan,
    store: Store,
    inputs: dict[str, Manifest],
    copies: dict[str, list[tuple[File, str]]],
    content: str,
    work: Path,
) -> Release:
    name = f"{plan.stamp}-{content[:12]}"
    folder = registry.version_folder(plan.line, name)
    verdict = _verdict(store, inputs["evaluation"])
    numbers = {artifact_name: dict(m.numbers) for artifact_name, m in inputs.items()}
    documents = {
        "README.md": model_card(config, plan, name, verdict, numbers),
        "recipe.json": json.dumps(recipe(plan), indent=1) + "\n",
        "sbom.json": json.dumps(sbom(plan, name), indent=1) + "\n",
        "LICENCE.md": f"The model is published under: {config.licence}. Its software is listed in `sbom.json`.\n",
    }
    written = work / "version"
    written.mkdir()
    for path, text in documents.items():
        (written / path).write_text(text, encoding="utf-8")
    store.copy([(f"{inputs[n].prefix}/{f.path}", f"{folder}/{t}") for n, pairs in copies.items() for f, t in pairs])
    store.upload(written, folder, documents)
    copied = [f.model_copy(update={"path": target}) for pairs in copies.values() for f, target in pairs]
    files = tuple(sorted([*copied, *artifact.list_files(written)], key=lambda f: f.path))
    _check_copied(store, folder, files)
    base = plan.sources["base_model"]
    assert base is not None
    return registry.complete(
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
            base={"files": {f.path: f.pin for f in base.files}},
            numbers=numbers,
            provenance={"run_id": plan.run_id, "steps": {n: m.provenance for n, m in inputs.items()}},
        ),
    )


def _anchor(plan: Plan, version: str, model: Manifest) -> str:
    """The line's best version from now on: this one, where its merged form was surely better than the best."""
    if model.numbers.get("best") == "anchor" and plan.anchor:
        return plan.anchor.version
    return plan.champion.version if model.numbers.get("best") == "champion" and plan.champion else version


def _verdict(store: Store, evaluation: Manifest) -> dict[str, Any]:
    """The evaluation's document, verified: the model card repeats it."""
    data = store.read(f"{evaluation.prefix}/evaluation.json").data
    promised = next(f.sha256 for f in evaluation.files if f.path == "evaluation.json")
    if hashing.sha256_bytes(data) != promised:
        raise artifact.corrupt(store, evaluation, "evaluation.json: its sha256 differs from the manifest's")
    found: dict[str, Any] = json.loads(data)
    return found


def _check_copied(store: Store, folder: str, files: tuple[File, ...]) -> None:
    """Names and sizes of what was copied, before the manifest promises them."""
    there = {e.path.removeprefix(f"{folder}/"): e.size_bytes for e in store.list(folder)}
    wrong = [f.path for f in files if there.get(f.path) != f.size_bytes]
    if wrong:
        raise IntegrityError(f"{store.uri}/{folder}/{wrong[0]}: was not copied whole; run again")
