"""Published models: versions that are written once, aliases that move atomically, an audit trail that only grows.

models/<line>/versions/<version>/...              files first, manifest.json last: without it there is no version
models/<line>/aliases/<alias>.json                compare-and-swap
models/<line>/audit/<generation>-<alias>-<id>.json  one entry a move
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import Conflict, Exists, NotFound, Store

LATEST = "latest"
PRODUCTION = "production"
_MOVES_KEPT = 10
_SWAP_TRIES = 8
_ALIAS = r"[a-z][a-z0-9-]{0,31}"


class Release(BaseModel):
    """A version's manifest: its files by hash, and what it was made of.

    Attributes:
        anchor: The line's best version from this one on, as its merged form was judged; None in older ones: itself.
    """

    model_config = ConfigDict(frozen=True)
    schema_version: Literal[1] = 1
    line: str
    version: str
    content_hash: str
    created_at: str
    files: tuple[File, ...]
    adapter_key: str
    judgement: str
    anchor: str | None = None
    keys: dict[str, str | None]
    base: dict[str, Any]
    numbers: dict[str, Any]
    provenance: dict[str, Any]

    def parts(self, *names: str) -> tuple[File, ...]:
        """The files that have these names or lie in folders of these names."""
        return tuple(f for f in self.files if f.path in names or f.path.partition("/")[0] in names)


class Move(BaseModel):
    """One earlier state of an alias."""

    model_config = ConfigDict(frozen=True)
    version: str
    generation: int
    at: str


class Alias(BaseModel):
    """What a movable name says."""

    model_config = ConfigDict(frozen=True)
    version: str
    manifest_sha256: str
    generation: int
    moves: tuple[Move, ...] = ()
    rejected: tuple[str, ...] = ()
    request_id: str
    reason: str
    actor: str
    at: str


def version_folder(line: str, version: str) -> str:
    """The store's folder of a version."""
    return f"models/{line}/versions/{version}"


def read_release(store: Store, line: str, version: str, *, sha256: str | None = None) -> Release:
    """A version's manifest.

    Args:
        store: Where.
        line: The line.
        version: The version.
        sha256: What the manifest's bytes must hash to, where an alias says.

    Raises:
        UsageError: If there is no such version.
        IntegrityError: If the manifest is not the one that the alias names.
    """
    path = f"{version_folder(line, version)}/manifest.json"
    try:
        data = store.read(path).data
    except NotFound as error:
        raise UsageError(f"{store.uri}: line {line} has no version {version}") from error
    if sha256 is not None and hashing.sha256_bytes(data) != sha256:
        raise IntegrityError(
            f"{store.uri}/{path}: wanted sha256 {sha256[:12]}, found {hashing.sha256_bytes(data)[:12]}"
        )
    try:
        release = Release.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"{store.uri}/{path}: not a version's manifest") from error
    if (release.line, release.version) != (line, version):
        raise IntegrityError(f"{store.uri}/{path}: is the manifest of {release.line} {release.version}")
    return release


def manifest_sha256(store: Store, line: str, version: str) -> str:
    """The hash by which an alias names a version."""
    return hashing.sha256_bytes(store.read(f"{version_folder(line, version)}/manifest.json").data)


def find_content(store: Store, line: str, content_hash: str) -> Release | None:
    """The version that holds exactly this content, or None."""
    for name in store.children(f"models/{line}/versions"):
        if name.endswith(f"-{content_hash[:12]}"):
            try:
                found = read_release(store, line, name)
            except UsageError:
                continue  # an attempt that died before its manifest
            if found.content_hash == content_hash:
                return found
    return None


def complete(store: Store, release: Release) -> Release:
    """Write a version's manifest, the last of its files; another writer's wins if it was first."""
    path = f"{version_folder(release.line, release.version)}/manifest.json"
    try:
        store.write_if_absent(path, release.model_dump_json(indent=1).encode())
    except Exists:
        return read_release(store, release.line, release.version)
    return release


def alias(store: Store, line: str, name: str) -> tuple[Alias | None, str | None]:
    """What an alias says and the tag of that state; (None, None) where it was never set."""
    path = f"models/{line}/aliases/{name}.json"
    try:
        stored = store.read(path)
    except NotFound:
        return None, None
    try:
        return Alias.model_validate_json(stored.data), stored.tag
    except ValidationError as error:
        raise IntegrityError(f"{store.uri}/{path}: not an alias") from error


def move(
    store: Store,
    line: str,
    name: str,
    release: Release,
    *,
    reason: str,
    expected: str | None = "",
    override: bool = False,
    reject_current: bool = False,
) -> Alias | None:
    """Point an alias at a version, in one atomic write.

    Args:
        store: Where.
        line: The line.
        name: The alias.
        release: The version that it will name.
        reason: For the audit trail.
        expected: The version that the alias must name now (None: none); "" where any will do.
        override: Move to a version whose content a rollback has rejected.
        reject_current: Put the content that the alias leaves on its list of rejected ones (a rollback).

    Returns:
        The alias's new state; None where it names that version already, or `latest` would go back in time.

    Raises:
        TryAgain: If the alias does not name what was expected, or others keep moving it.
        QualityRefused: If the version's content was rejected and there is no override.
        UsageError: If an alias cannot have that name.
    """
    if not re.fullmatch(_ALIAS, name):
        raise UsageError(f"{name!r}: an alias is a lower-case letter, then letters, digits and -, 32 in all at most")
    for _ in range(_SWAP_TRIES):
        now, tag = alias(store, line, name)
        current = now.version if now else None
        if now is not None:
            _audit(store, line, name, now)  # first: whoever moved it may have died before
        if current == release.version or (name == LATEST and current is not None and current > release.version):
            return None
        if expected not in ("", current):
            raise TryAgain(f"{name} named {expected or 'nothing'} when the plan was made and {current} now; plan again")
        rejected = list(now.rejected) if now else []
        if release.content_hash in rejected and not override:
            raise QualityRefused(
                f"{release.version}: its content was rolled back from {name}; to promote it all the same, run: "
                f"qlora-retrain promote {line} {release.version} --alias {name} --override --reason ..."
            )
        if reject_current and current is not None:
            rejected.append(read_release(store, line, current).content_hash)
        new = _next(now, release, manifest_sha256(store, line, release.version), reason, rejected)
        try:
            store.swap(f"models/{line}/aliases/{name}.json", new.model_dump_json(indent=1).encode(), tag)
        except Conflict:
            continue
        _audit(store, line, name, new)
        return new
    raise TryAgain(f"{name}: others keep moving it; run the same command again")


def rollback(store: Store, line: str, name: str, *, reason: str) -> Alias:
    """Move an alias back to the newest earlier version that was not rejected, and reject the content that it leaves.

    Raises:
        UsageError: If there is nothing to go back to.
        TryAgain: If the alias moved meanwhile.
    """
    if name == LATEST:
        raise UsageError(f"{line}@{LATEST}: names the newest version, whatever its worth; roll back {PRODUCTION}")
    now, _ = alias(store, line, name)
    for earlier in reversed(now.moves if now else ()):
        release = read_release(store, line, earlier.version)
        if now and release.version != now.version and release.content_hash not in now.rejected:
            moved = move(store, line, name, release, reason=reason, expected=now.version, reject_current=True)
            if moved is None:
                break
            return moved
    raise UsageError(f"{line}@{name}: names no earlier version to go back to")


def _next(now: Alias | None, release: Release, sha256: str, reason: str, rejected: list[str]) -> Alias:
    moves = list(now.moves) if now else []
    if now:
        moves.append(Move(version=now.version, generation=now.generation, at=now.at))
    return Alias(
        version=release.version,
        manifest_sha256=sha256,
        generation=now.generation + 1 if now else 1,
        moves=tuple(moves[-_MOVES_KEPT:]),
        rejected=tuple(dict.fromkeys(h for h in rejected if h != release.content_hash)),
        request_id=uuid.uuid4().hex[:12],
        reason=reason,
        actor=f"{_user()}@{socket.gethostname()}",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _audit(store: Store, line: str, name: str, state: Alias) -> None:
    path = f"models/{line}/audit/{state.generation:08d}-{name}-{state.request_id}.json"
    data = state.model_dump_json(indent=1).encode()
    with contextlib.suppress(Exists):  # written by another release of this code, in other bytes
        store.write_if_absent(path, data)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return f"user {os.getuid()}"
