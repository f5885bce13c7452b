"""A consumer's side: pull a version that is exactly what was published, or nothing.

Alias → manifest by hash → every file by hash, into a temporary folder, then renamed. A generation lower than the one
pulled before is refused: an alias only moves forward, so less means an old copy of the store.

Command: `qlora-retrain pull LINE@ALIAS DEST --root URI`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import NotFound, Store

RECORD = "_pulled.json"


def resolve(store: Store, reference: str) -> tuple[Release, dict[str, Any]]:
    """The version that `LINE@ALIAS` or `LINE@VERSION` names, and what to remember of it.

    Raises:
        UsageError: If the reference names nothing.
        IntegrityError: If the manifest is not the one that the alias promised.
    """
    line, at, name = reference.partition("@")
    if not at or not line or not name:
        raise UsageError(f"{reference}: wanted LINE@ALIAS, e.g. support-intents@production")
    alias, _ = registry.alias(store, line, name)
    if alias is None:
        if "-" not in name:
            raise UsageError(f"{store.uri}: line {line} has no alias {name}; nothing was published or promoted to it")
        release = registry.read_release(store, line, name)
        sha256 = registry.manifest_sha256(store, line, name)
        return release, {"line": line, "alias": None, "version": name, "generation": 0, "manifest_sha256": sha256}
    release = registry.read_release(store, line, alias.version, sha256=alias.manifest_sha256)
    return release, {
        "line": line,
        "alias": name,
        "version": alias.version,
        "generation": alias.generation,
        "manifest_sha256": alias.manifest_sha256,
    }


def pull(store: Store, reference: str, destination: Path) -> Release:
    """Put a verified version at `destination`; whatever an earlier pull put there is replaced, and only that.

    Raises:
        UsageError: If the reference names nothing, or the destination holds something that no pull made.
        IntegrityError: If a byte differs from what was published, or the alias went back in time.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - "." needs a name; a link stays a link
    release, record = resolve(store, reference)
    earlier = _earlier(destination)
    seen = earlier.get("seen", {})
    generation, version = seen.get(reference, (0, None))
    if record["generation"] < generation or (
        record["generation"] == generation and version not in (None, release.version)
    ):
        raise IntegrityError(
            f"{reference}: generation {record['generation']} with {release.version} does not follow generation "
            f"{generation} with {version}, pulled before into {destination}; this store is an old copy, or was "
            "tampered with"
        )
    record["seen"] = {**seen, reference: (record["generation"], release.version)}
    wanted = [("manifest.json", record["manifest_sha256"]), *((f.path, f.sha256) for f in release.files)]
    if earlier.get("version") == release.version and _fault(destination, wanted) is None:
        _remember(destination, record)
        return release
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        folder = registry.version_folder(release.line, release.version)
        with contextlib.suppress(NotFound):  # which the next line finds too
            store.download(folder, [path for path, _ in wanted], temporary)
        fault = _fault(temporary, wanted)
        if fault is not None:
            raise IntegrityError(f"{store.uri}/{folder}/{fault}; nothing was written to {destination}")
        _remember(temporary, record)
        _replace(destination, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return release


def _earlier(destination: Path) -> dict[str, Any]:
    """What an earlier pull remembers; empty where there was none."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return {}
    try:
        found = json.loads((destination / RECORD).read_text())
        found["seen"], found["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{destination}: is not empty and no pull made it; choose another folder") from error
    return dict(found)


def _fault(folder: Path, wanted: Sequence[tuple[str, str]]) -> str | None:
    """The first (path, sha256) that is not so, or None."""
    for name, sha256 in wanted:
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if hashing.sha256_file(path) != sha256:
            return f"{name}: is not what was published (sha256 differs)"
    return None


def _remember(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _replace(destination: Path, new: Path) -> None:
    if not destination.exists():
        new.rename(destination)
        return
    old = destination.with_name(f".{destination.name}.old-{uuid.uuid4().hex[:8]}")
    destination.rename(old)
    new.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
