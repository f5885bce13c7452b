"""Published models: versions that are written once, aliases that move atomically, an audit trail that only grows.

models/<line>/versions/<version>/...              files first, manifest.json last: without it there is no version
models/<line>/aliases/<alias>.json                compare-and-swap
models/<line>/audit/<generation>-<alias>-<id>.json  one entry per move

`registry_documents.py` has the documents' fields, `versions.py` reads and verifies versions.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from qlora_retrain.core import aliases
from qlora_retrain.core.errors import Cause, IntegrityError, Problem, TryAgain, UsageError
from qlora_retrain.storage import actor, audit, collection_mark, keys, rejections, signatures
from qlora_retrain.storage.registry_documents import Action as Action
from qlora_retrain.storage.registry_documents import Alias as Alias
from qlora_retrain.storage.registry_documents import Move as Move
from qlora_retrain.storage.registry_documents import Rejection as Rejection
from qlora_retrain.storage.registry_documents import Release as Release
from qlora_retrain.storage.store import Conflict, NotFound, Store, root_option
from qlora_retrain.storage.version_repair import read_remembered as read_remembered
from qlora_retrain.storage.version_repair import verify_or_repair as verify_or_repair
from qlora_retrain.storage.versions import complete_version as complete_version
from qlora_retrain.storage.versions import find_by_content as find_by_content
from qlora_retrain.storage.versions import first_fault as first_fault
from qlora_retrain.storage.versions import read_release as read_release
from qlora_retrain.storage.versions import verify_version as verify_version
from qlora_retrain.storage.versions import version_folder as version_folder

LATEST, PRODUCTION = aliases.LATEST, aliases.PRODUCTION
# Earlier states that an alias lists, so the number of rollbacks in a row that it allows.
_MAX_MOVES = 10
_MAX_SWAP_ATTEMPTS = 8  # other writers may move an alias between our read and our write
# Computes an alias's next state from its present one; None: it stays as it is.
NextState = Callable[[Alias | None], Alias | None]


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


def change_alias(store: Store, line: str, name: str, next_state: NextState) -> Alias | None:
    """Replace an alias's state in one atomic write, and write the audit entry of the new one.

    An entry that cannot be written after the alias has moved is no error: the state is in the alias, signed as the
    entry would be, and whoever changes the alias next writes the entry first. So does `models repair`.

    Args:
        store: The store.
        line: The line.
        name: The alias.
        next_state: Called again where another writer was faster, with the state that is there then.

    Returns:
        The new state, or None where it stays as it is.

    Raises:
        TryAgain: If others keep moving the alias.
    """
    path = audit.alias_path(line, name)
    for _ in range(_MAX_SWAP_ATTEMPTS):
        state, tag = read_alias(store, line, name)
        if state is not None:
            # A process without keys could not sign the next state, and would take the signature away.
            signatures.refuse_unverified(store, path, state.signature)
            # The writer of this state may have died before it wrote the audit entry.
            audit.write_entry(store, line, name, state)
        new = next_state(state)
        if new is None:
            return None
        new = signatures.sign(store, path, new, keys.publish_role(line))
        data = new.model_dump_json(indent=1).encode()
        try:
            if state is not None and state.version == new.version:
                store.swap(path, data, tag)
            else:
                collection_mark.swap_alias(store, line, new.version, path, data, tag)
        except Conflict:
            continue  # another writer moved it: decide again from its new state
        try:
            audit.write_entry(store, line, name, new)
        except Problem as problem:
            # On the other stream, since programs read the result.
            print(
                f"warning: {line}@{name} names {new.version} now, and the audit entry of this move could not be "
                f"written: {problem}; nothing is to be repeated: the next move writes it first, and so does: "
                f"qlora-retrain models repair {line} {root_option(store)}",
                file=sys.stderr,
            )
        return new
    raise TryAgain(f"{line}@{name}: other writers keep moving it; run the same command again", cause=Cause.CONFLICT)


def move_alias(
    store: Store,
    line: str,
    name: str,
    release: Release,
    *,
    reason: str,
    expected: str | None = "",
    override: bool = False,
    action: Action = "promote",
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
        override: Allow a version that was rejected; it is rejected no longer then.
        action: What the move is. A rollback rejects the version that it leaves.
        is_verified: Whether the caller has just verified every byte of the version.
        request_id: The id of the new state, by which a repeated request finds what it did; None: a new one.

    Returns:
        The alias's new state. None where it names that version already, or `latest` would go back to an older one.

    Raises:
        TryAgain: If the alias does not name the expected version, or others keep moving it.
        QualityRefused: If the version was rejected and there is no override.
        IntegrityError: If a byte of the version differs from its manifest, and no artifact has it any more.
        UsageError: If an alias cannot have that name.
    """
    if not aliases.is_alias_name(name):
        raise UsageError(f"{name!r}: an alias is a lower-case letter, then letters, digits and -, 32 in all at most")
    signatures.refuse_unverified(store, audit.alias_path(line, name), release.signature)

    def next_state(state: Alias | None) -> Alias | None:
        nonlocal is_verified
        current = state.version if state else None
        # An older run that ends after a newer one must not take `latest` back.
        if current == release.version or (
            name == LATEST and action != "repair" and current and not _is_newer(store, release, current)
        ):
            return None
        if expected not in ("", current):
            raise TryAgain(
                f"{name} named {expected or 'nothing'} when this was decided and names {current} now; plan again, or "
                "decide again",
                cause=Cause.CONFLICT,
            )
        # What goes back goes to a version that was in this place, and may have the recipe of the one that it leaves.
        if action == "rollback":
            rejections.refuse_return(name, state, release)
        elif not override and action == "promote":
            rejections.refuse(store, line, name, state, release)
        if not is_verified:
            verify_or_repair(store, release)
            is_verified = True

        actor_name, run_reason = actor.describe(store), actor.with_run_reason(reason)
        new = _moved(state, release)
        if action == "rollback" and current is not None:
            rejection = rejections.of_version(store, line, current, reason=run_reason, actor=actor_name)
            new = rejections.add(new, rejection)
        elif override:
            new = rejections.remove(store, name, new, release)
        return stamped(new, state, action, run_reason, actor_name, request_id)

    return change_alias(store, line, name, next_state)


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
    """Move an alias back to the newest earlier version that was not rejected, and reject the version that it leaves.

    What is rejected can come back only with `promote --override`, so that the next run does not promote it again.
    Where `current` is given, the alias must name it.

    Raises:
        UsageError: If there is nothing to go back to, or it is another version than `version`.
        IntegrityError: If that version is not what it was, and cannot be mended.
        TryAgain: If the alias moved meanwhile.
    """
    if name == LATEST:
        raise UsageError(f"{line}@{LATEST}: always names the newest version, promoted or not; roll back {PRODUCTION}")
    state, _ = read_alias(store, line, name)
    if state is None:
        raise UsageError(f"{store.uri}: line {line} has no alias {name}, so there is no earlier version to go back to")
    earlier = earlier_move(state)
    if earlier is None:
        raise UsageError(
            f"{line}@{name}: names {state.version}, and no earlier version to go back to that was not rejected; "
            f"promote a version that is right: qlora-retrain promote {line} VERSION --reason ... {root_option(store)}"
        )
    if version not in (None, earlier.version):
        raise UsageError(f"{line}@{name}: goes back to {earlier.version}, and {version} was asked for")

    release = read_remembered(store, line, earlier.version, sha256=earlier.manifest_sha256)
    moved = move_alias(
        store, line, name, release, reason=reason, expected=current or state.version, action="rollback",
        request_id=request_id,
    )  # fmt: skip
    if moved is None:  # another writer has moved the alias there already
        raise TryAgain(f"{line}@{name}: somebody else has just moved it to {release.version}", cause=Cause.CONFLICT)
    return moved


def earlier_move(state: Alias, *, before: Move | None = None) -> Move | None:
    """Return the newest earlier state of an alias whose version was not rejected: where a rollback goes.

    Args:
        state: The state of the alias.
        before: One of its earlier states: only those before it are considered, and none of the same version.
    """
    moves = state.moves if before is None else state.moves[: state.moves.index(before)]
    others = {state.version, before.version if before else state.version}
    candidates = (move for move in reversed(moves) if move.version not in others)
    return next((move for move in candidates if not rejections.is_rejected_name(state, move.version)), None)


def next_sequence(store: Store, line: str) -> int:
    """Return the `sequence` of a version whose run is planned now."""
    try:
        state, _ = read_alias(store, line, LATEST)
    except IntegrityError:
        # It orders versions and decides nothing, so a line may be planned whose publisher's key was stolen.
        return 1 + audit.newest_generation(store, line, LATEST)
    return 1 + (state.generation if state else 0)


def stamped(
    new: Alias, state: Alias | None, action: Action, reason: str, actor_name: str, request_id: str | None = None
) -> Alias:
    """Return a new state of an alias with who made it, when and why, as the one that follows `state`."""
    return new.model_copy(
        update={
            "signature": None,
            "generation": state.generation + 1 if state else 1,
            "action": action,
            "request_id": request_id or uuid.uuid4().hex[:12],
            "reason": reason,
            "actor": actor_name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def _is_newer(store: Store, release: Release, current: str) -> bool:
    """Return whether a version comes after the one that `latest` names; after one that is lost, any does."""
    try:
        return release.order > read_release(store, release.line, current).order
    except (UsageError, IntegrityError):
        return True


def _moved(state: Alias | None, release: Release) -> Alias:
    """Return a state that names another version; `stamped` says who moved it."""
    moves: tuple[Move, ...] = ()
    if state is not None:
        # The current state becomes the newest of the earlier ones.
        last = Move(
            version=state.version, generation=state.generation, at=state.at, manifest_sha256=state.manifest_sha256
        )
        moves = (*state.moves, last)[-_MAX_MOVES:]
    return Alias(
        version=release.version, manifest_sha256=release.sha256, generation=0, moves=moves,
        rejected=state.rejected if state else (), rejections=state.rejections if state else (),
        request_id="", reason="", actor="", at="",
    )  # fmt: skip
