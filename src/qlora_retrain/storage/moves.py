"""Moves of an alias that a person asks for: of the version that the person saw it name, once, and told by whom.

Between the decision and the move somebody else may move the alias. Then the decision was about another state, and the
move is refused (12) with who moved it, when and why. A move that is repeated ends in the same state: by its id, or by
the version that it left (`--from`). A rollback that names neither is refused after a rollback, since nobody can tell
whether it is a repeated one or a further one.
Command: `qlora-retrain promote | rollback ... --from VERSION --request ID`
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import unquote

from qlora_retrain.core.aliases import LATEST, PRODUCTION, STAGING
from qlora_retrain.core.errors import Cause, IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import actor, audit, last_move, move_requests, probes, registry, version_repair
from qlora_retrain.storage.move_requests import NOTHING as NOTHING
from qlora_retrain.storage.move_requests import REQUEST_PATTERN as REQUEST_PATTERN
from qlora_retrain.storage.move_requests import Request as Request
from qlora_retrain.storage.registry import Alias
from qlora_retrain.storage.store import NotFound, Store

# How far the clock of a planner may be ahead of that of a publisher.
_CLOCK_TOLERANCE = timedelta(days=30)
_AIRFLOW_USER = re.compile(r"airflow:(\S+) via ")


def promote(store: Store, request: Request, version: str, *, override: bool = False) -> Alias | None:
    """Point the alias at a version; return its new state, or None where it named that version already.

    A request with an id is remembered in either case, so that it moves nothing when it is repeated later.

    Args:
        store: The store.
        request: The request.
        version: The version.
        override: Allow a version that was rejected.

    Raises:
        UsageError: If the alias names another version than the person saw, there is no such version, or the alias is
            `latest`.
        QualityRefused: If the version was rejected and there is no override.
        IntegrityError: If a byte of the version differs from its manifest and cannot be mended, or the manifest is not
            the one that the audit trail remembers.
        TryAgain: With the command that repeats this move, and ends in the same state whether this try moved or not.
    """
    # `latest` names the newest version. Moved by hand, it would be wrong until the next publication.
    if request.alias == LATEST:
        raise UsageError(f"{LATEST} names the newest version by itself; promote another alias")
    refuse_empty_reason(request)
    if done := find_done(store, request):
        if done.version != version:
            raise _used_for_another_move(request, done)
        return done if last_move.has_moved(done) else None
    state, _ = registry.read_alias(store, request.line, request.alias)
    if state is not None and state.version == version and _has_left(state, request.current):
        _remember(store, request, state, "promote", version)
        return None
    refuse_moved(request, state)
    # What this try saw. Where the alias moves meanwhile, the repeated command says who moved it.
    pinned = replace(request, current=state.version if state else NOTHING)
    with _repeatable(store, pinned, "promote", version, *(["--override"] if override else [])):
        release = version_repair.read_remembered(store, request.line, version)
        probes.ensure_conditional_writes(store)
        return registry.move_alias(
            store,
            request.line,
            request.alias,
            release,
            reason=request.reason,
            expected="" if request.current is None else _or_none(request.current),
            override=override,
            request_id=request.request_id,
        )


def rollback(store: Store, request: Request, version: str | None = None) -> Alias:
    """Move the alias back, and reject the version that it leaves; return its new state.

    Args:
        store: The store.
        request: The request; its `current` is the version to leave. The alias stays where a rollback has left it.
        version: The version that the person saw it go back to; None: whichever is next.

    Raises:
        UsageError: If the alias names another version than the person saw, goes back to another, or to none; or if the
            last move was a rollback, and the request does not say which version it leaves.
        IntegrityError: If the earlier version is not what it was, and cannot be mended.
        TryAgain: With the command that repeats this rollback, and ends in the same state whether this try moved or not.
    """
    refuse_empty_reason(request)
    if done := find_done(store, request):
        if done.action == "promote" or not _find_rollback(store, request, done):
            raise _used_for_another_move(request, done)
        return done
    state, _ = registry.read_alias(store, request.line, request.alias)
    if state is not None and (move := _find_rollback(store, request, state)):
        left = state.moves[-1].version
        if request.current == left and version in (None, state.version):
            return _remember(store, request, state, "rollback")
        if request.current is None:
            further, same = (
                move_requests.command(store, replace(request, current=current), "rollback")
                for current in (state.version, left)
            )
            raise UsageError(
                f"{request.line}@{request.alias}: the last move was a rollback already: {move.actor} left {left} at "
                f"{move.at} ({move.reason}), and the alias names {state.version} now. To make sure of that rollback, "
                f"run:\n  {same}\nTo go back one more version, and reject {state.version} too, run:\n  {further}"
            )
    refuse_moved(request, state)
    pinned = replace(request, current=state.version if state else NOTHING)
    with (
        _repeatable(store, pinned, "rollback", *([f"--to={version}"] if version else [])),
        _passable(store, pinned, state),
    ):
        probes.ensure_conditional_writes(store)
        return registry.rollback(
            store,
            request.line,
            request.alias,
            reason=request.reason,
            # Else a rollback of somebody else in between would be followed by one more.
            current=pinned.current,
            version=version,
            request_id=request.request_id,
        )


@contextlib.contextmanager
def _repeatable(store: Store, request: Request, verb: str, *arguments: str) -> Iterator[None]:
    """Have every `TryAgain` of the block say by which command the move is repeated."""
    try:
        yield
    except TryAgain as problem:
        again = move_requests.command(store, request, verb, *arguments)
        # The command as it was typed might make a further move.
        reason = str(problem).replace("; run the same command again", "")
        raise TryAgain(
            f"{reason}; to repeat this move and no other one, run: {again}", cause=problem.cause
        ) from problem


@contextlib.contextmanager
def _passable(store: Store, request: Request, state: Alias | None) -> Iterator[None]:
    """Have an `IntegrityError` of the block say how to go back past the version that a rollback would go to."""
    try:
        yield
    except IntegrityError as problem:
        broken = registry.earlier_move(state) if state else None
        further = registry.earlier_move(state, before=broken) if state and broken else None
        if state is None or further is None:
            raise
        promotion = move_requests.command(store, request, "promote", further.version)
        rejection = move_requests.command_to_reject(store, request, state.version)
        raise IntegrityError(
            f"{problem}; to go back to {further.version}, which was named before that one, run both:\n  {promotion}\n"
            f"  {rejection}"
        ) from problem


def _find_rollback(store: Store, request: Request, state: Alias) -> Alias | None:
    return last_move.find_rollback(store, request.line, request.alias, state)


def _has_left(state: Alias, current: str | None) -> bool:
    """Return whether a state follows the one that a person saw, so that their move is done."""
    before = state.moves[-1].version if state.moves else NOTHING
    return current in (None, before, state.version)


def _remember(
    store: Store, request: Request, before: Alias, verb: Literal["promote", "rollback"], *words: str
) -> Alias:
    """Write the id of a request that has nothing to move into a further state of the alias; return the alias's state.

    Else the same request, repeated after somebody else has moved the alias, would move it.
    """
    audit.write_entry(store, request.line, request.alias, before)
    if request.request_id is None:
        return before
    reason, actor_name = actor.with_run_reason(request.reason), actor.describe(store)

    def next_state(state: Alias | None) -> Alias:
        if state is None or state.request_id != before.request_id:
            raise TryAgain(f"{request.line}@{request.alias}: somebody else has just moved it", cause=Cause.CONFLICT)
        return registry.stamped(state, state, verb, reason, actor_name, request.request_id)

    with _repeatable(store, replace(request, current=request.current or before.version), verb, *words):
        probes.ensure_conditional_writes(store)
        return registry.change_alias(store, request.line, request.alias, next_state) or before


def find_done(store: Store, request: Request) -> Alias | None:
    """Return the state that an earlier try of this very request left; None where there was none."""
    if request.request_id is None:
        return None
    state, _ = registry.read_alias(store, request.line, request.alias)
    if state is not None and state.request_id == request.request_id:
        # The earlier try may have died before it wrote the entry.
        audit.write_entry(store, request.line, request.alias, state)
        return state

    folder, end = f"models/{request.line}/audit", f"-{request.alias}-{request.request_id}.json"
    name = next((name for name in store.children(folder) if name.endswith(end)), None)
    if name is None:
        return None
    with contextlib.suppress(IntegrityError, NotFound):
        return audit.read_entry(store, f"{folder}/{name}")
    return None


def refuse_empty_reason(request: Request) -> None:
    """Refuse a move without a reason: who reads the audit trail later has nothing else."""
    if not request.reason.strip():
        raise UsageError(
            f"{request.line}@{request.alias}: expected a reason for the audit trail, found an empty text; say it with "
            "--reason"
        )


def _used_for_another_move(request: Request, done: Alias) -> UsageError:
    """Return the error of a request whose id another move has."""
    return UsageError(
        f"{request.line}@{request.alias}: the request {request.request_id} was used before, for another move, to "
        f"{done.version} at {done.at}; nothing was moved: give a request of your own another id"
    )


def requesters(store: Store, line: str, version: str) -> set[str]:
    """Return the users of Airflow whose runs published a version: none of them may approve it."""
    planned_at = datetime.strptime(version.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    # By another machine's clock: one that ran ahead must not hide who asked.
    begins_at = min(planned_at, datetime.now(UTC)) - _CLOCK_TOLERANCE
    return {
        unquote(match[1])
        for state in _states_since(store, line, begins_at)
        if state.version == version and (match := _AIRFLOW_USER.match(state.actor))
    }


def _states_since(store: Store, line: str, begins_at: datetime) -> Iterator[Alias]:
    """Yield the states of the aliases that runs move, back to a time."""
    # A run moves `latest`, and beside it one of the two others. By hand nobody moves `latest`.
    for name in (LATEST, STAGING):
        for state in audit.entries(store, line, name):
            if datetime.fromisoformat(state.at) < begins_at:
                break
            yield state


def refuse_moved(request: Request, state: Alias | None) -> None:
    """Refuse a request whose alias names another version than the person saw."""
    actual = state.version if state else NOTHING
    if request.current in (None, actual):
        return
    moved = f": {state.actor} moved it at {state.at} ({state.reason})" if state else ""
    raise UsageError(
        f"{request.line}@{request.alias}: named {request.current} when this was decided, and names {actual} now"
        f"{moved}; look at what it names now, and decide again"
    )


def _or_none(version: str) -> str | None:
    return None if version == NOTHING else version


def describe_current(store: Store, line: str, alias: str = PRODUCTION) -> str:
    """Return the version that an alias names, or `none`."""
    state, _ = registry.read_alias(store, line, alias)
    return state.version if state else NOTHING
