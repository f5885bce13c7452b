"""Verify a version before an alias moves to it: its manifest by the hash in the audit trail, then each file by its own.

A file that is missing or has other bytes is copied again from the artifact that it was copied from, if that still has
it. A manifest is written once and lies nowhere else: one that is lost or changed is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from qlora_retrain.core import graph
from qlora_retrain.core.errors import Cause, IntegrityError, TryAgain
from qlora_retrain.storage import artifact, audit, release_files, versions
from qlora_retrain.storage.artifact import File, Manifest
from qlora_retrain.storage.registry_documents import Release
from qlora_retrain.storage.store import NotFound, Store


def read_remembered(store: Store, line: str, version: str, *, sha256: str | None = None) -> Release:
    """Read a version's manifest, and compare it with what the line's audit trail says of it.

    Args:
        store: The store.
        line: The line.
        version: The version.
        sha256: The hash, where the caller remembers it; None: the newest audit entry of the version has it. A version
            that no alias ever named has none.

    Raises:
        UsageError: If there is no such version, and no alias ever named it.
        IntegrityError: If the manifest is another one, or was lost.
    """
    sha256 = sha256 or audit.remembered_sha256(store, line, version)
    hint = "a manifest lies nowhere else, so it cannot be mended: choose another version, or train again"
    try:
        return versions.read_release(store, line, version, sha256=sha256)
    except IntegrityError as error:
        raise IntegrityError(f"{error}: {hint}") from error


def verify_or_repair(store: Store, release: Release, *, is_dry_run: bool = False) -> tuple[str, ...]:
    """Compare every byte of a version with its manifest, and copy what differs again from its artifacts.

    Args:
        store: The store.
        release: The version, of a manifest that is trusted.
        is_dry_run: Only look whether the artifacts have what is needed.

    Returns:
        The paths of the files that were copied again.

    Raises:
        IntegrityError: If a file differs that no artifact has any more, or one is none that a version may have.
        TryAgain: If an artifact is removed while it is copied.
    """
    folder = versions.version_folder(release.line, release.version)
    faults = list(versions.faults(store, folder, release.files))
    if faults:
        sources = _sources(store, release, [file for file, _ in faults])
        for file, fault in faults:
            if file.sha256 not in sources:
                raise IntegrityError(
                    f"{store.uri}/{folder}/{file.path}: {fault}, and no artifact of its run has that file any more: no "
                    "alias moves to a version that is not what its manifest names; choose another version, or train "
                    "again"
                )
        if not is_dry_run:
            try:
                store.copy([(sources[file.sha256], f"{folder}/{file.path}") for file, _ in faults])
            except NotFound as error:
                raise TryAgain(
                    f"{error}: was removed while a file of version {release.version} was copied from it; run the same "
                    "command again",
                    cause=Cause.INPUT_MISSING,
                ) from error
            # Hashed where consumers will read them.
            if difference := versions.first_fault(store, folder, [file for file, _ in faults]):
                raise IntegrityError(f"{store.uri}/{folder}/{difference[0].path}: {difference[1]} after it was mended")
            for file, fault in faults:
                print(f"{store.uri}/{folder}/{file.path}: {fault}; copied again from its artifact", file=sys.stderr)
    if not (faults and is_dry_run):
        release_files.refuse_unsafe(store, folder, release.files)
    return tuple(file.path for file, _ in faults)


def _sources(store: Store, release: Release, files: list[File]) -> dict[str, str]:
    """Return where the artifacts of the version's run have these files, by hash; every byte of them is read."""
    wanted_hashes = {file.sha256 for file in files}
    sources: dict[str, str] = {}
    for manifest in _artifacts(store, release):
        for file in manifest.files:
            path = f"{manifest.prefix}/{file.path}"
            if file.sha256 in wanted_hashes - sources.keys() and _sha256(store, path) == file.sha256:
                sources[file.sha256] = path
    return sources


def _artifacts(store: Store, release: Release) -> Iterator[Manifest]:
    """Yield the artifacts of the version's run that are still there; what cannot be trusted is left out."""
    for step in graph.STEPS:
        key = release.keys.get(step.name)
        try:
            manifest = artifact.find_manifest(store, step.makes, key) if key else None
        except IntegrityError:
            continue
        if manifest is not None:
            yield manifest


def _sha256(store: Store, path: str) -> str | None:
    try:
        return store.sha256(path)
    except NotFound:
        return None
