"""Reject a version by hand, or take that back: the alias stays where it is, and its list of rejections changes.

Command: `qlora-retrain models reject | unreject LINE VERSION --reason TEXT`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qlora_retrain.core.aliases import LATEST
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import actor, move_requests, moves, probes, registry, rejections
from qlora_retrain.storage.moves import Request
from qlora_retrain.storage.registry import Action, Alias
from qlora_retrain.storage.store import Store


def reject(store: Store, request: Request, version: str) -> Alias | None:
    """Keep an alias from naming a version, what has its content, and what its recipe makes.

    One whose manifest was lost or changed is rejected by its name alone, so that no rollback goes back to it.

    Returns:
        The alias's new state; None where the version was rejected already.

    Raises:
        UsageError: If there is no such version, or the alias names it now: a rollback rejects what it leaves.
    """
    content = _content_hash(store, request.line, version)

    def add(state: Alias) -> Alias | None:
        if state.version == version:
            raise _named_now(store, request, state)
        rejected = rejections.of_alias(store, request.line, request.alias, state)
        if any(version == r.version or (content is not None and content == r.content_hash) for r in rejected):
            return None
        reason, actor_name = actor.with_run_reason(request.reason), actor.describe(store)
        rejection = rejections.of_version(store, request.line, version, reason=reason, actor=actor_name)
        return rejections.add(state, rejection)

    return _change(store, request, "reject", add)


def unreject(store: Store, request: Request, version: str) -> Alias | None:
    """Allow an alias to name a version again, what has its content, and what its recipe makes.

    Returns:
        The alias's new state; None where nothing had rejected the version.

    Raises:
        UsageError: If there is no such version.
        IntegrityError: If its manifest was lost or changed.
    """
    release = registry.read_remembered(store, request.line, version)

    def remove(state: Alias) -> Alias | None:
        if rejections.find(store, request.line, request.alias, state, release) is None:
            return None
        return rejections.remove(store, request.alias, state, release)

    return _change(store, request, "unreject", remove)


def _named_now(store: Store, request: Request, state: Alias) -> UsageError:
    """Return the error for a version that the alias names: it has to be left first."""
    of_current = replace(request, current=state.version, request_id=None)
    if registry.earlier_move(state) is not None:
        hint = f"a rollback leaves it and rejects it: {move_requests.command(store, of_current, 'rollback')}"
    else:
        promotion = move_requests.command(store, of_current, "promote", "VERSION")
        hint = f"it has no earlier version to go back to; promote another one, then reject this one: {promotion}"
    return UsageError(f"{request.line}@{request.alias}: names {state.version} now; {hint}")


def _content_hash(store: Store, line: str, version: str) -> str | None:
    """Return the hash of a version's content; None where its manifest was lost or changed."""
    try:
        return registry.read_remembered(store, line, version).content_hash
    except IntegrityError:
        return None


def _change(store: Store, request: Request, action: Action, change: Callable[[Alias], Alias | None]) -> Alias | None:
    if request.alias == LATEST:
        raise UsageError(f"{LATEST} names the newest version by itself; reject a version for another alias")
    moves.refuse_empty_reason(request)
    probes.ensure_conditional_writes(store)
    reason, actor_name = actor.with_run_reason(request.reason), actor.describe(store)

    def next_state(state: Alias | None) -> Alias | None:
        if state is None:
            raise UsageError(f"{store.uri}: line {request.line} has no alias {request.alias}, so nothing is rejected")
        new = change(state)
        return None if new is None else registry.stamped(new, state, action, reason, actor_name, request.request_id)

    return registry.change_alias(store, request.line, request.alias, next_state)
