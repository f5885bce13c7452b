"""Published models: versions that are written once, aliases that move atomically, an audit trail that only grows.

models/<line>/versions/<version>/...              files first, manifest.json last: without it there is no version
models/<line>/aliases/<alias>.json                compare-and-swap
models/<line>/audit/<generation>-<alias>-<id>.json  one entry per move

`registry_documents.py` has the documents' fields.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from qlora_retrain.core import aliases, hashing
from qlora_retrain.core.errors import Cause, IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.storage import actor, audit, collection_mark, keys, release_files, signatures
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry_documents import Alias as Alias
from qlora_retrain.storage.registry_documents import Move as Move
from qlora_retrain.storage.registry_documents import Release as Release
from qlora_retrain.storage.store import AlreadyExists, Conflict, NotFound, Store

LATEST, PRODUCTION = aliases.LATEST, aliases.PRODUCTION
# Earlier states that an alias lists, so the number of rollbacks in a row that it allows.
_MAX_MOVES = 10
_MAX_SWAP_ATTEMPTS = 8  # other writers may move an alias between our read and our write
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
        IntegrityError: If the manifest is not the one that the alias names.
    """
    path = f"{version_folder(line, version)}/manifest.json"
    try:
        data = store.read(path).data
    except NotFound as error:
        raise UsageError(f"{store.uri}: line {line} has no version {version}") from error

    actual = hashing.sha256_bytes(data)
    if sha256 not in (None, actual):
        raise IntegrityError(f"{store.uri}/{path}: expected sha256 {sha256[:12]}, found {actual[:12]}")

    try:
        release = signatures.parse(store, path, data, Release, keys.publish_role(line))
    except ValueError as error:
        raise IntegrityError(f"{store.uri}/{path}: not a version's manifest") from error
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


def first_fault(store: Store, folder: str, files: Sequence[File]) -> tuple[File, str] | None:
    """Return the first file below a folder of the store that is missing or has other bytes, and what is wrong.

    Every byte is read and hashed: a size proves nothing.
    """

    def fault(file: File) -> str | None:
        try:
            return None if store.sha256(f"{folder}/{file.path}") == file.sha256 else "its sha256 differs"
        except NotFound:
            return "missing"

    # Threads, because hashing and waiting for a server both release Python's global lock.
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        faults = zip(files, pool.map(fault, files), strict=True)
        return next(((file, text) for file, text in faults if text), None)


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


def read_alias(store: Store, line: str, name: str) -> tuple[Alias | None, str | None]:
    """Return an alias and the tag of its document; (None, None) where it was never set.

    Raises:
        IntegrityError: If it is no alias; where the store has keys, also if the line's publisher did not sign it, or
            the audit trail has a later state.
    """
    state, tag = _alias_document(store, line, name)
    try:
        audit.refuse_older_state(store, line, name, state)
    except IntegrityError:
        # Another writer may have moved the alias since it was read.
        if _alias_document(store, line, name)[1] == tag:
            raise
        return read_alias(store, line, name)
    return state, tag


def _alias_document(store: Store, line: str, name: str) -> tuple[Alias | None, str | None]:
    try:
        return audit.read_alias(store, line, name)
    except NotFound:
        return None, None


def move_alias(
    store: Store,
    line: str,
    name: str,
    release: Release,
    *,
    reason: str,
    expected: str | None = "",
    override: bool = False,
    reject_current: bool = False,
    is_verified: bool = False,
    request_id: str | None = None,
) -> Alias | None:
    """Point an alias at a version whose bytes are those of its manifest, in one atomic write.

    Args:
        store: The store.
        line: The line.
        name: The alias.
        release: The version that the alias will name.
        reason: The reason, for the audit trail.
        expected: The version that the alias must name now (None: none); "" accepts any.
        override: Allow a version whose content a rollback has rejected.
        reject_current: Add the content that the alias leaves to its rejected contents, as a rollback does.
        is_verified: Whether the caller has just called `verify_version`, which reads every byte.
        request_id: The id of the new state, by which a repeated request finds what it did; None: a new one.

    Returns:
        The alias's new state. None where it names that version already, or `latest` would go back in time.

    Raises:
        TryAgain: If the alias does not name the expected version, or others keep moving it.
        QualityRefused: If the version's content was rejected and there is no override.
        IntegrityError: If a byte of the version differs from its manifest.
        UsageError: If an alias cannot have that name.
    """
    if not aliases.is_alias_name(name):
        raise UsageError(f"{name!r}: an alias is a lower-case letter, then letters, digits and -, 32 in all at most")

    path = audit.alias_path(line, name)
    for _ in range(_MAX_SWAP_ATTEMPTS):
        state, tag = read_alias(store, line, name)
        # A process without keys could not sign the next state, and would take the signature away.
        signatures.refuse_unverified(store, path, release.signature or (state.signature if state else None))
        current = state.version if state else None
        if state is not None:
            # The writer of this state may have died before it wrote the audit entry.
            audit.write_entry(store, line, name, state)

        # An older run that ends after a newer one must not take `latest` back.
        if current == release.version or (name == LATEST and current is not None and current > release.version):
            return None
        if expected not in ("", current):
            raise TryAgain(
                f"{name} named {expected or 'nothing'} when the plan was made and {current} now; plan again",
                cause=Cause.CONFLICT,
            )

        # By content and not by version, so that the same model under a new version is refused too.
        rejected = list(state.rejected) if state else []
        if not override:
            refuse_rejected(line, name, state, release)
        if reject_current and current is not None:
            rejected.append(read_release(store, line, current).content_hash)
        if not is_verified:
            verify_version(store, release)
            is_verified = True

        new = _next_state(state, release, reason, rejected, actor.describe(store), request_id)
        new = signatures.sign(store, path, new, keys.publish_role(line))
        try:
            collection_mark.swap_alias(store, release, path, new.model_dump_json(indent=1).encode(), tag)
        except Conflict:
            continue  # another writer moved it: decide again from its new state
        audit.write_entry(store, line, name, new)
        return new
    raise TryAgain(f"{line}@{name}: other writers keep moving it; run the same command again", cause=Cause.CONFLICT)


def rollback(
    store: Store,
    line: str,
    name: str,
    *,
    reason: str,
    current: str | None = None,
    version: str | None = None,
    request_id: str | None = None,
) -> Alias:
    """Move an alias back to the newest earlier version that was not rejected, and reject the content that it leaves.

    The rejected content can come back only with `promote --override`, so that the next run does not promote it again.
    Where `current` is given, the alias must name it.

    Raises:
        UsageError: If there is nothing to go back to, or it is another version than `version`.
        TryAgain: If the alias moved meanwhile.
    """
    if name == LATEST:
        raise UsageError(f"{line}@{LATEST}: always names the newest version, promoted or not; roll back {PRODUCTION}")
    state, _ = read_alias(store, line, name)
    for earlier in reversed(state.moves if state else ()):
        release = read_release(store, line, earlier.version)
        if state and release.version != state.version and release.content_hash not in state.rejected:
            if version not in (None, release.version):
                raise UsageError(f"{line}@{name}: goes back to {release.version}, and {version} was asked for")
            moved = move_alias(
                store, line, name, release, reason=reason, expected=current or state.version, reject_current=True,
                request_id=request_id,
            )  # fmt: skip
            if moved is None:  # another writer has moved the alias there already
                break
            return moved
    raise UsageError(f"{line}@{name}: names no earlier version to go back to")


def refuse_rejected(line: str, name: str, state: Alias | None, release: Release) -> None:
    """Raise QualityRefused for a version whose content a rollback of the alias has rejected."""
    if state is not None and release.content_hash in state.rejected:
        raise QualityRefused(
            f"{release.version}: its content was rolled back from {name}; to promote it all the same, run: "
            f"qlora-retrain promote {line} {release.version} --alias {name} --override --reason ..."
        )


def _next_state(
    state: Alias | None, release: Release, reason: str, rejected: list[str], actor_name: str, request_id: str | None
) -> Alias:
    """Return the state of an alias after a move."""
    # The current state becomes the newest of the earlier ones.
    moves = list(state.moves) if state else []
    if state:
        moves.append(Move(version=state.version, generation=state.generation, at=state.at))
    return Alias(
        version=release.version,
        manifest_sha256=release.sha256,
        generation=state.generation + 1 if state else 1,
        moves=tuple(moves[-_MAX_MOVES:]),
        # Each content once, in order; with an override the content that comes back is no longer rejected.
        rejected=tuple(dict.fromkeys(h for h in rejected if h != release.content_hash)),
        request_id=request_id or uuid.uuid4().hex[:12],
        reason=actor.with_run_reason(reason),
        actor=actor_name,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
