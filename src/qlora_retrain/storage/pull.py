"""Pull a published version to a folder: exactly the bytes that were published, or nothing.

The alias names a manifest by its hash, and the manifest names every file by its hash. All go into a temporary folder,
which is then renamed. A generation below that of an earlier pull is refused: the generation of an alias only grows, so
a lower one comes from an old copy of the store. A signature by another key than that of an earlier pull is refused too.

Command: `qlora-retrain pull LINE@ALIAS DEST --root URI`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_retrain.core import aliases, hashing, safety
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import artifact, keys, plain_files, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.signatures import Signed
from qlora_retrain.storage.store import NotFound, Store

# Left in the destination: which version it holds, and the newest generation of every reference pulled into it.
RECORD = "_pulled.json"


def resolve(store: Store, reference: str) -> tuple[Release, dict[str, Any]]:
    """Return the version that `LINE@ALIAS` or `LINE@VERSION` names, and the record for the next pull to compare with.

    Raises:
        UsageError: If the reference names nothing.
        IntegrityError: If the manifest is not the one that the alias promised.
    """
    # The part after the @ is tried as an alias first.
    line, at, name = reference.partition("@")
    if not at or not line or not name:
        raise UsageError(f"{reference}: expected LINE@ALIAS, e.g. support-intents@production")

    # A version's name is none of an alias, so nobody can put an alias in its place.
    alias = registry.read_alias(store, line, name)[0] if aliases.is_alias_name(name) else None
    if alias is None:
        # A version has a - between its time and its hash; most aliases have none.
        if "-" not in name:
            raise UsageError(f"{store.uri}: line {line} has no alias {name}; nothing was published or promoted to it")
        release = registry.read_release(store, line, name)
        record = {"line": line, "alias": None, "version": name, "generation": 0, "manifest_sha256": release.sha256}
        return release, record | {"signer": _fingerprint(release)}
    release = registry.read_release(store, line, alias.version, sha256=alias.manifest_sha256)
    # Whoever signs versions signs aliases too.
    if release.signer and not alias.signer:
        raise IntegrityError(
            f"{reference}: is not signed, and {alias.version}, which it names, is: somebody else moved it"
        )
    return release, {
        "line": line,
        "alias": name,
        "version": alias.version,
        "generation": alias.generation,
        "manifest_sha256": alias.manifest_sha256,
        # The alias names the manifest by its hash, so its signature is one for the version, too.
        "signer": _fingerprint(alias),
    }


def pull(
    store: Store, reference: str, destination: Path, *, min_generation: int = 0, verify_key: str | None = None
) -> Release:
    """Put a verified version at `destination`; this replaces only what an earlier pull put there.

    Args:
        store: The store.
        reference: `LINE@ALIAS` or `LINE@VERSION`.
        destination: A new folder, or that of an earlier pull.
        min_generation: The lowest generation of the alias that is accepted. A new folder remembers no earlier pull, so
            only this shows there that a store is an old copy.
        verify_key: The fingerprint of the publisher's key. None: the key that an earlier pull recorded; a first pull
            records the one that it finds.

    Raises:
        UsageError: If the reference names nothing, or the destination holds something that no pull made.
        IntegrityError: If a byte differs from what was published, a file is none that a version may have, the alias
            went back in time, or another key than the expected one signed.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - "." needs a name; a link stays a link
    release, record = resolve(store, reference)
    if min_generation and record["alias"] is None:
        raise UsageError(f"{reference}: a version has no generation; --min-generation is for an alias")
    if record["generation"] < min_generation:
        raise IntegrityError(
            f"{reference}: expected generation {min_generation} or a later one, found {record['generation']} with "
            f"{release.version}; this store is an old copy, or was tampered with"
        )

    previous = _previous_record(destination)
    _refuse_other_signer(reference, record, verify_key, previous)
    known_signers = previous.get("signers", {})
    record["signers"] = known_signers | ({record["line"]: record["signer"]} if record["signer"] else {})
    known_generations = previous.get("seen", {})
    generation, version = known_generations.get(reference, (0, None))
    # One generation is one move of the alias, so it can never name two versions either.
    if record["generation"] < generation or (
        record["generation"] == generation and version not in (None, release.version)
    ):
        raise IntegrityError(
            f"{reference}: generation {record['generation']} with {release.version} does not follow generation "
            f"{generation} with {version}, pulled before into {destination}; this store is an old copy, or was "
            "tampered with"
        )
    record["seen"] = {**known_generations, reference: (record["generation"], release.version)}

    safety.refuse_foreign((file.path for file in release.files), f"{reference}: {release.version}")
    expected = [("manifest.json", record["manifest_sha256"]), *((f.path, f.sha256) for f in release.files)]
    if previous.get("version") == release.version and _fault(destination, expected) is None:
        _write_record(destination, record)
        return release

    # Everything is checked in a folder beside the destination, so that the destination is never half a version.
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        folder = registry.version_folder(release.line, release.version)
        # Before they fill the disk.
        if fault := artifact.size_fault(store, folder, release.files):
            raise IntegrityError(f"{store.uri}/{folder}/{fault}; nothing was written to {destination}")
        # A file that is missing in the store is reported below, with its name.
        with contextlib.suppress(NotFound):
            store.download(folder, [path for path, _ in expected], temporary)
        fault = _fault(temporary, expected)
        if fault is not None:
            raise IntegrityError(f"{store.uri}/{folder}/{fault}; nothing was written to {destination}")
        safety.refuse_unsafe(temporary, f"{reference}: {release.version}")
        _write_record(temporary, record)
        _replace(destination, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return release


def recorded_signer(destination: Path) -> str | None:
    """Return the fingerprint of the key that signed what a folder holds; None where nothing was signed."""
    signer: str | None = json.loads((destination / RECORD).read_text())["signer"]
    return signer


def _fingerprint(document: Signed) -> str | None:
    return keys.fingerprint(document.signer) if document.signer else None


def _refuse_other_signer(
    reference: str, record: Mapping[str, Any], verify_key: str | None, previous: Mapping[str, Any]
) -> None:
    """Refuse what another key signed than the one that the caller gives, or that an earlier pull recorded."""
    expected = verify_key or previous.get("signers", {}).get(record["line"])
    if expected in (None, record["signer"]):
        return
    actual = f"a signature by {record['signer']}" if record["signer"] else "no valid signature"
    where = "--verify-key" if verify_key else "an earlier pull"
    raise IntegrityError(
        f"{reference}: expected a signature by {expected}, as {where} says, found {actual}; if the publisher replaced "
        "the key, get the new one's fingerprint from them and pull with --verify-key"
    )


def _previous_record(destination: Path) -> dict[str, Any]:
    """Return the record of the last pull into the destination; empty where there was none."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return {}
    try:
        record = json.loads((destination / RECORD).read_text())
        # A file of that name that no pull wrote lacks these fields.
        record["seen"], record["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{destination}: is not empty and no pull made it; choose another folder") from error
    return dict(record)


def _fault(folder: Path, expected: Sequence[tuple[str, str]]) -> str | None:
    """Return the first fault of a folder that must hold these (path, sha256) and nothing else, or None."""
    if foreign := plain_files.first_foreign(folder, {RECORD, *(name for name, _ in expected)}):
        return foreign
    for name, sha256 in expected:
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if hashing.sha256_file(path) != sha256:
            return f"{name}: is not what was published (sha256 differs)"
    return None


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _replace(destination: Path, new: Path) -> None:
    """Put the new folder in the place of the old one, with two renames; a rename cannot replace a folder with files."""
    if not destination.exists():
        new.rename(destination)
        return
    # Beside the destination and hidden: on the same file system, so that both are renames.
    old = destination.with_name(f".{destination.name}.old-{uuid.uuid4().hex[:8]}")
    destination.rename(old)
    new.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
