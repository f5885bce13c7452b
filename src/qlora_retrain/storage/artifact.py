"""Artifacts: folders of files that exist once their manifest does.

artifacts/<artifact>/<key>/<attempt>/...files     an attempt writes only in its own folder
artifacts/<artifact>/<key>/_manifest.json         names the attempt that won; written last, only if absent
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.core.outcome import Number
from qlora_retrain.storage.store import Exists, NotFound, Store


class File(BaseModel):
    """One file, relative to its folder."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, where its files are, and what made it.

    Attributes:
        inputs: The key of each thing it was made from.
        read: The content hash of each artifact it was made from: the same key can be made twice, in other bytes.
    """

    model_config = ConfigDict(frozen=True)
    schema_version: Literal[1] = 1
    artifact: str
    key: str
    step: str
    attempt: str
    outcome: Literal["done", "refused"]
    exit_code: int
    reason: str | None = None
    numbers: dict[str, Number]
    files: tuple[File, ...]
    inputs: dict[str, str | None]
    read: dict[str, str] = {}
    config: dict[str, Any]
    code: str
    provenance: dict[str, Any]

    @property
    def prefix(self) -> str:
        """The folder in the store that holds the files."""
        return f"{folder(self.artifact, self.key)}/{self.attempt}"

    @property
    def content_hash(self) -> str:
        """The hash of its files, whoever made them."""
        return hashing.content_hash((f.path, f.sha256) for f in self.files)


def new_attempt() -> str:
    """A name that no other attempt has."""
    return uuid.uuid4().hex[:12]


def folder(artifact: str, key: str) -> str:
    """The store's folder of an artifact."""
    return f"artifacts/{artifact}/{key}"


def manifest_path(artifact: str, key: str) -> str:
    """Where the manifest is, if the artifact exists."""
    return f"{folder(artifact, key)}/_manifest.json"


def find(store: Store, artifact: str, key: str) -> Manifest | None:
    """The artifact's manifest, or None while there is none.

    Raises:
        IntegrityError: If what is there is no manifest of that artifact.
    """
    path = manifest_path(artifact, key)
    try:
        data = store.read(path).data
    except NotFound:
        return None
    try:
        found = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"{store.uri}/{path}: not a manifest: {_drop_hint(store, artifact, key)}") from error
    if (found.artifact, found.key) != (artifact, key):
        raise IntegrityError(
            f"{store.uri}/{path}: names {found.artifact}/{found.key}: {_drop_hint(store, artifact, key)}"
        )
    return found


def check(store: Store, manifest: Manifest) -> None:
    """Compare the names and sizes in the store with the manifest; hashes are checked where the bytes are used.

    Raises:
        IntegrityError: Naming the file and the command that drops the artifact.
    """
    there = {e.path.removeprefix(f"{manifest.prefix}/"): e.size_bytes for e in store.list(manifest.prefix)}
    for file in manifest.files:
        if there.get(file.path) != file.size_bytes:
            found = f"{there[file.path]} bytes" if file.path in there else "missing"
            raise corrupt(store, manifest, f"{file.path}: wanted {file.size_bytes} bytes, found {found}")


def corrupt(store: Store, manifest: Manifest, what: str) -> IntegrityError:
    """The error for an artifact whose bytes are not what its manifest promised."""
    where = f"{store.uri}/{manifest.prefix}"
    return IntegrityError(f"{where}: {what}: {_drop_hint(store, manifest.artifact, manifest.key)}")


def drop(store: Store, artifact: str, key: str) -> list[str]:
    """Remove an artifact and all that was made from it, manifests first, so that they can be made again.

    What was made from it goes too, because made again it may come out in other bytes.

    Returns:
        `<artifact>/<key>` of each that was removed; none if there was nothing.

    Raises:
        UsageError: If the artifact or the key cannot be one.
    """
    if artifact not in (s.makes for s in graph.STEPS) or not re.fullmatch(r"[0-9a-f]{64}", key):
        raise UsageError(
            f"{artifact} {key}: wanted one of {', '.join(s.makes for s in graph.STEPS)} and a key of 64 hex"
        )
    files = [e.path for e in store.list(folder(artifact, key))]
    dropped = []
    if files:
        store.delete([manifest_path(artifact, key)])
        store.delete([path for path in files if path != manifest_path(artifact, key)])
        dropped.append(f"{artifact}/{key}")
    for step in graph.STEPS:
        if artifact in (i.name for i in step.reads):
            for other in store.children(f"artifacts/{step.makes}"):
                with contextlib.suppress(IntegrityError):  # not readable: its own message names its own command
                    made = find(store, step.makes, other)
                    if made is not None and made.inputs.get(artifact) == key:
                        dropped += drop(store, step.makes, other)
    return dropped


def list_files(root: Path) -> tuple[File, ...]:
    """Every file below a local folder, with sizes and hashes, sorted by path."""
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    return tuple(
        File(path=p.relative_to(root).as_posix(), size_bytes=p.stat().st_size, sha256=hashing.sha256_file(p))
        for p in paths
    )


def complete(store: Store, local: Path, manifest: Manifest) -> Manifest:
    """Upload an attempt's folder and write its manifest last.

    Args:
        store: Where to.
        local: The folder that `manifest.files` describes.
        manifest: What to promise.

    Returns:
        The manifest that counts: ours, or that of the attempt that was first; then ours is removed.

    Raises:
        IntegrityError: If the winner's files are not what it promised.
        TryAgain: If the winner was dropped meanwhile.
    """
    store.upload(local, manifest.prefix, [f.path for f in manifest.files])
    data = manifest.model_dump_json(indent=1).encode()
    try:
        store.write_if_absent(manifest_path(manifest.artifact, manifest.key), data)
    except Exists:
        store.delete([f"{manifest.prefix}/{f.path}" for f in manifest.files])
        winner = find(store, manifest.artifact, manifest.key)
        if winner is None:
            raise TryAgain(f"{store.uri}/{manifest.prefix}: the manifest was there and is gone; run again") from None
        check(store, winner)
        return winner
    return manifest


def summary(manifest: Manifest) -> Mapping[str, Number]:
    """Its numbers and its outcome, for a line in a log."""
    return {"outcome": manifest.outcome, **manifest.numbers}


def _drop_hint(store: Store, artifact: str, key: str) -> str:
    return f"to make it again, run: qlora-retrain drop {artifact} {key} --root {store.uri}"
