"""Published versions: written once, files first, manifest last; read and verified by hashes.

models/<line>/versions/<version>/...              files first, manifest.json last: without it there is no version
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import keys, release_files, signatures
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry_documents import Release
from qlora_retrain.storage.store import AlreadyExists, NotFound, Store, root_option

# Files of a version that are hashed at once.
_NUM_READERS = 8


def version_folder(line: str, version: str) -> str:
    """Return the store's folder of a version."""
    return f"models/{line}/versions/{version}"


def read_release(store: Store, line: str, version: str, *, sha256: str | None = None) -> Release:
    """Read a version's manifest.

    Args:
        store: The store.
        line: The line.
        version: The version.
        sha256: The hash that the manifest's bytes must have, where an alias names it; None: any.

    Raises:
        UsageError: If there is no such version.
        IntegrityError: If the manifest is not the one that the alias names, or is lost.
    """
    path = f"{version_folder(line, version)}/manifest.json"
    try:
        data = store.read(path).data
    except NotFound as error:
        if sha256 is not None:
            # Files are removed after the manifest, and those of a version that was collected as a whole.
            is_gone = next(iter(store.children(version_folder(line, version))), None) is None
            cause = ", and none of its files is there: a collection of garbage or somebody else removed it"
            raise IntegrityError(
                f"{store.uri}: version {version} of line {line} has no manifest, and an alias or the audit trail says "
                f"that it had one{cause if is_gone else ''}"
            ) from error
        raise UsageError(
            f"{store.uri}: line {line} has no version {version}; to see those that it has, run: qlora-retrain models "
            f"list {line} {root_option(store)}"
        ) from error

    actual = hashing.sha256_bytes(data)
    if sha256 not in (None, actual):
        raise IntegrityError(
            f"{store.uri}/{path}: expected sha256 {sha256[:12]}, as the alias or the audit trail says, found "
            f"{actual[:12]}; the manifest is damaged, or somebody changed it"
        )

    try:
        release = signatures.parse(store, path, data, Release, keys.publish_role(line))
    except ValueError as error:
        raise IntegrityError(
            f"{store.uri}/{path}: not a version's manifest: expected the JSON document of one, found {len(data):,} "
            "bytes that are none; the manifest is damaged, or somebody changed it"
        ) from error
    if (release.line, release.version) != (line, version):
        raise IntegrityError(f"{store.uri}/{path}: is the manifest of {release.line} {release.version}")
    release_files.refuse_hostile_list(release.files, f"{store.uri}/{path}")
    release._sha256 = actual
    return release


def find_by_content(store: Store, line: str, content_hash: str) -> Release | None:
    """Return the version that holds exactly this content, or None."""
    for name in store.children(f"models/{line}/versions"):
        # A version's name ends with 12 digits of its content's hash, so few manifests have to be read.
        if name.endswith(f"-{content_hash[:12]}"):
            try:
                release = read_release(store, line, name)
            except (UsageError, IntegrityError):
                continue  # an attempt that died before it wrote its manifest, or what somebody else put there
            if release.content_hash == content_hash:
                return release
    return None


def complete_version(store: Store, release: Release) -> Release:
    """Write a version's manifest, the last of its files; return the one that is there then, of the first writer."""
    path = f"{version_folder(release.line, release.version)}/manifest.json"
    release = signatures.sign(store, path, release, keys.publish_role(release.line))
    with contextlib.suppress(AlreadyExists):
        store.write_if_absent(path, release.model_dump_json(indent=1).encode())
    return read_release(store, release.line, release.version)


def faults(store: Store, folder: str, files: Sequence[File]) -> Iterator[tuple[File, str]]:
    """Yield each file below a folder of the store that is missing or has other bytes, and what is wrong.

    Every byte is read and hashed: a size proves nothing.
    """

    def fault(file: File) -> str | None:
        try:
            return None if store.sha256(f"{folder}/{file.path}") == file.sha256 else "its sha256 differs"
        except NotFound:
            return "missing"

    # Threads, because hashing and waiting for a server both release Python's global lock.
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        yield from ((file, text) for file, text in zip(files, pool.map(fault, files), strict=True) if text)


def first_fault(store: Store, folder: str, files: Sequence[File]) -> tuple[File, str] | None:
    """Return the first file below a folder of the store that is missing or has other bytes, and what is wrong."""
    return next(faults(store, folder, files), None)


def verify_version(store: Store, release: Release) -> None:
    """Compare every byte of a version in the store with its manifest.

    Raises:
        IntegrityError: If a file is missing, has other bytes, or is none that a version may have.
    """
    folder = version_folder(release.line, release.version)
    if difference := first_fault(store, folder, release.files):
        file, fault = difference
        raise IntegrityError(
            f"{store.uri}/{folder}/{file.path}: {fault}: no alias moves to a version that is not what its manifest "
            "names; choose another version, or train again"
        )
    release_files.refuse_unsafe(store, folder, release.files)
