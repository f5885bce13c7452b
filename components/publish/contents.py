"""Choose the files of a version: which files of the artifacts it has, under which paths, and the hash of its content.

The adapter's config is the one file that a version has otherwise than the artifact: it names the base's id on the
Hugging Face Hub, so that PEFT and other loaders find the base, or else a folder beside the program that loads it. What
training names is a folder of its own, which no consumer has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from components.publish.base_model import FOLDER, BaseId
from qlora_retrain.core import graph, hashing
from qlora_retrain.storage.artifact import File, Manifest

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
# Of a version without an adapter, with the adapter.
_EXPORTS = "model/exports/"
ADAPTER_CONFIG = "adapter/adapter_config.json"


@dataclass(frozen=True, slots=True)
class Copy:
    """A file of an artifact that is copied.

    Attributes:
        artifact: The artifact.
        file: Its file there.
        target: Its path in the version.
    """

    artifact: str
    file: File
    target: str

    @property
    def copied(self) -> File:
        """The file as the version's manifest has it."""
        return self.file.model_copy(update={"path": self.target})


def choose(inputs: Mapping[str, Manifest], parts: Iterable[str]) -> list[Copy]:
    """Return the files of a version that has some parts (`publish.parts`)."""
    copies = [
        Copy(name, file, target) for name, manifest in inputs.items() for file, target in _targets(name, manifest)
    ]
    replaced = {copy.target for copy in copies if copy.artifact == "model" and copy.target.startswith(_MERGED_ADAPTER)}
    copies = [copy for copy in copies if copy.artifact != "adapter" or copy.target not in replaced]
    if "adapter" not in parts:
        copies = [copy for copy in copies if not copy.target.startswith(_MERGED_ADAPTER)]
    if "exports" not in parts:
        copies = [copy for copy in copies if not copy.target.startswith(_EXPORTS)]
    return copies


def is_adapter_alone(copies: Iterable[Copy]) -> bool:
    """Return whether these are the files of a version without a merged model."""
    return any(copy.target == graph.BASE_REFERENCE for copy in copies)


def content_hash(copies: Iterable[Copy], written: Mapping[str, str]) -> str:
    """Return the hash of a version's content.

    Only the adapter and the model are content, so a new report of the same model makes no new version.

    Args:
        copies: The files that are copied.
        written: The texts that are written instead of some, by path.
    """

    def sha256(copy: Copy) -> str:
        text = written.get(copy.target)
        return copy.file.sha256 if text is None else hashing.sha256_bytes(text.encode())

    return hashing.content_hash(
        (copy.target, sha256(copy))
        for copy in copies
        if copy.artifact in _CONTENT_ARTIFACTS and copy.target.startswith(_CONTENT_FOLDERS)
    )


def adapter_config(document: Mapping[str, object], base: BaseId | None) -> str:
    """Return an adapter's config with the base's id on the Hub, or with the folder where a consumer puts the base."""
    name, commit = (base.repository, base.commit) if base else (FOLDER, None)
    named = {**document, "base_model_name_or_path": name, "revision": commit}
    return json.dumps(named, indent=2, sort_keys=True) + "\n"


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
