"""Artifacts: folders of files that exist once their manifest does.

artifacts/<artifact>/<key>/<attempt>/...files     an attempt writes only in its own folder
artifacts/<artifact>/<key>/_manifest.json         names the attempt that won; written last, only if absent

The field names of `File` and `Manifest` are the JSON of every manifest in every store: never rename one.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import Cause, IntegrityError, TryAgain, UsageError
from qlora_retrain.core.outcome import Number
from qlora_retrain.storage import keys, signatures
from qlora_retrain.storage.signatures import Signed
from qlora_retrain.storage.store import AlreadyExists, NotFound, Store, is_valid_path, root_option


class File(BaseModel):
    """One file of a folder; its path is relative to that folder."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    sha256: str


class Manifest(Signed):
    """What an artifact is, where its files are, and what made it.

    Attributes:
        inputs: The key of each input.
        read: The content hash of each artifact among the inputs. A key does not determine the bytes: an artifact that
            was dropped and made again has the same key and may have other bytes.
        config: The identity fields of the step's section.
        code: The hash of the step's code.
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
    read: dict[str, str] = Field(default={})
    config: dict[str, Any]
    code: str
    provenance: dict[str, Any]

    @property
    def prefix(self) -> str:
        """The store's folder that holds the files."""
        return f"{artifact_folder(self.artifact, self.key)}/{self.attempt}"

    @property
    def content_hash(self) -> str:
        """The hash of the files alone, the same for every attempt that made the same bytes."""
        return hashing.content_hash((f.path, f.sha256) for f in self.files)


def new_attempt_id() -> str:
    """Return a name that no other attempt has."""
    # Random, because attempts at one key may run on several machines that do not know of each other.
    return uuid.uuid4().hex[:12]


def artifact_folder(artifact: str, key: str) -> str:
    """Return the store's folder of an artifact."""
    return f"artifacts/{artifact}/{key}"


def manifest_path(artifact: str, key: str) -> str:
    """Return the path at which the manifest is, once the artifact exists."""
    return f"{artifact_folder(artifact, key)}/_manifest.json"


def signing_role(artifact: str, key: str, fields: Mapping[str, Any]) -> str:
    """Return the role that signs an artifact's manifest; what no role signs has a name that no role has.

    Args:
        artifact: The artifact.
        key: Its key, as the manifest's path says.
        fields: The manifest's fields.
    """
    step = graph.producer(artifact)
    if step is None:
        return f"the maker of {artifact}"
    if step.kind != graph.StepKind.PUBLISH:
        return step.name
    # One publisher for each line, and the line is part of the key. Without that, a publisher could tell the run of
    # another line that its version is published.
    try:
        inputs = fields["inputs"]
        is_its_key = hashing.step_key(step.name, fields["config"], inputs, fields["code"]) == key
        return keys.step_role(step, inputs["line"]) if is_its_key else f"the publisher of the line in key {key[:12]}"
    except (KeyError, TypeError, ValueError, RecursionError):
        return f"the maker of {artifact}"


def find_manifest(store: Store, artifact: str, key: str) -> Manifest | None:
    """Return the artifact's manifest, or None while there is none.

    Raises:
        IntegrityError: If the document at that path is not a manifest of that artifact, signed by its step's role
            where the store has keys.
    """
    path = manifest_path(artifact, key)
    try:
        data = store.read(path).data
    except NotFound:
        return None

    try:
        manifest = signatures.parse(store, path, data, Manifest, lambda fields: signing_role(artifact, key, fields))
    except IntegrityError as error:
        raise IntegrityError(f"{error}: {_drop_hint(store, artifact, key)}") from error
    except ValueError as error:
        raise IntegrityError(f"{store.uri}/{path}: not a manifest: {_drop_hint(store, artifact, key)}") from error

    # A manifest that somebody copied to another key would otherwise pass for that key's artifact.
    if (manifest.artifact, manifest.key) != (artifact, key):
        raise IntegrityError(
            f"{store.uri}/{path}: names {manifest.artifact}/{manifest.key}: {_drop_hint(store, artifact, key)}"
        )
    return manifest


def check_files(store: Store, manifest: Manifest) -> None:
    """Compare the names and sizes in the store with the manifest.

    This lists a folder and reads no file; hashes are checked where the bytes are used.

    Raises:
        IntegrityError: If a file is missing or has another size. The message names the command that drops the artifact.
    """
    if fault := size_fault(store, manifest.prefix, manifest.files):
        raise corruption_error(store, manifest, fault)


def size_fault(store: Store, prefix: str, files: Iterable[File]) -> str | None:
    """Return which file below a folder of the store is missing or has another size, or None; reads no file."""
    # Names relative to the folder, as the files have them.
    sizes_bytes = {e.path.removeprefix(f"{prefix}/"): e.size_bytes for e in store.list(prefix)}
    for file in files:
        if sizes_bytes.get(file.path) != file.size_bytes:
            actual = f"{sizes_bytes[file.path]} bytes" if file.path in sizes_bytes else "missing"
            return f"{file.path}: expected {file.size_bytes} bytes, found {actual}"
    return None


def corruption_error(store: Store, manifest: Manifest, fault: str) -> IntegrityError:
    """Return the error for an artifact whose bytes are not those that its manifest promised."""
    where = f"{store.uri}/{manifest.prefix}"
    return IntegrityError(f"{where}: {fault}: {_drop_hint(store, manifest.artifact, manifest.key)}")


def drop(store: Store, artifact: str, key: str) -> list[str]:
    """Remove an artifact and everything that was made from it, so that the next run makes them again.

    What was made from it is removed too, because the artifact may have other bytes when it is made again.

    Returns:
        `<artifact>/<key>` of each artifact that was removed; empty if there was nothing.

    Raises:
        UsageError: If no artifact has that name, or the key is not a key.
    """
    if artifact not in (s.makes for s in graph.STEPS) or not re.fullmatch(r"[0-9a-f]{64}", key):
        raise UsageError(
            f"{artifact} {key}: expected one of {', '.join(s.makes for s in graph.STEPS)} and a key of 64 hex"
        )

    files = [e.path for e in store.list(artifact_folder(artifact, key)) if is_valid_path(e.path)]
    dropped = []
    if files:
        # The manifest first: without it the artifact does not exist, so no step uses it while its files disappear.
        store.delete([manifest_path(artifact, key)])
        store.delete([path for path in files if path != manifest_path(artifact, key)])
        dropped.append(f"{artifact}/{key}")

    for step in graph.STEPS:
        if artifact in (i.name for i in step.reads):
            for dependent_key in store.children(f"artifacts/{step.makes}"):
                # One that cannot be read is left; a step that reads it fails and names its `drop` command.
                with contextlib.suppress(IntegrityError, UsageError):
                    manifest = find_manifest(store, step.makes, dependent_key)
                    if manifest is not None and manifest.inputs.get(artifact) == key:
                        dropped += drop(store, step.makes, dependent_key)
    return dropped


def list_files(root: Path) -> tuple[File, ...]:
    """Return every file below a local folder with its size and hash, sorted by path."""
    # Sorted, so that the manifest of the same files is the same.
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    return tuple(
        File(path=p.relative_to(root).as_posix(), size_bytes=p.stat().st_size, sha256=hashing.sha256_file(p))
        for p in paths
    )


def complete(store: Store, local: Path, manifest: Manifest, *, line: str = "") -> Manifest:
    """Upload an attempt's folder and write its manifest last.

    Args:
        store: The store to upload to.
        local: The folder that `manifest.files` describes.
        manifest: The manifest to write.
        line: The line of the run, where a role of the line signs.

    Returns:
        The manifest of the attempt that was first. Where that is another attempt, our files are removed.

    Raises:
        IntegrityError: If the winner's files are not those that its manifest promised.
        TryAgain: If the winner was dropped meanwhile.
    """
    # Signed first: without its key the step could only leave files that nobody will use.
    role = keys.step_role(graph.step(graph.producer_name(manifest.artifact)), line)
    manifest = signatures.sign(store, manifest_path(manifest.artifact, manifest.key), manifest, role)
    # Files before the manifest: its existence means that all of them are there.
    store.upload(local, manifest.prefix, [f.path for f in manifest.files])

    data = manifest.model_dump_json(indent=1).encode()
    try:
        store.write_if_absent(manifest_path(manifest.artifact, manifest.key), data)
    except AlreadyExists:
        # Another attempt at the same key was faster. Its artifact is as good as ours, and there can be only one.
        store.delete([f"{manifest.prefix}/{f.path}" for f in manifest.files])
        winner = find_manifest(store, manifest.artifact, manifest.key)
        if winner is None:
            raise TryAgain(
                f"{store.uri}/{manifest.prefix}: another attempt's artifact was there and was dropped; run again",
                cause=Cause.INPUT_MISSING,
            ) from None
        check_files(store, winner)
        return winner
    return manifest


def summary(manifest: Manifest) -> Mapping[str, Number]:
    """Return the outcome and the numbers of an artifact, for a line in a log."""
    return {"outcome": manifest.outcome, **manifest.numbers}


def _drop_hint(store: Store, artifact: str, key: str) -> str:
    return f"to make it again, run: qlora-retrain drop {artifact} {key} {root_option(store)}"
