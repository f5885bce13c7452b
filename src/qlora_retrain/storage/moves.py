"""Moves of an alias that a person asks for: of the version that the person saw it name, once, and told by whom.

Between the decision and the move somebody else may move the alias. Then the decision was about another state, and the
move is refused (12) with who moved it, when and why. A request that is repeated finds in the audit trail that it was
done. Command: `qlora-retrain promote | rollback ... --from VERSION --request ID`
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import unquote

from qlora_retrain.core.aliases import LATEST, PRODUCTION, STAGING
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import audit, registry
from qlora_retrain.storage.registry import Alias
from qlora_retrain.storage.store import NotFound, Store

# Of an alias that was never set. No version is called so, since each begins with its time.
NOTHING = "none"
REQUEST_PATTERN = r"[0-9a-f]{12,64}"
_AIRFLOW_USER = re.compile(r"airflow:(\S+) via ")


@dataclass(frozen=True, slots=True)
class Request:
    """A move that a person asks for.

    Attributes:
        line: The line.
        alias: The alias that moves.
        reason: The reason, for the audit trail.
        current: The version that the alias named when the person decided; `none`: no version; None: any.
        request_id: Hexadecimal digits by which a repeated request finds what it did; None: it is never repeated.
    """

    line: str
    alias: str
    reason: str
    current: str | None = None
    request_id: str | None = None


def promote(store: Store, request: Request, version: str, *, override: bool = False) -> Alias | None:
    """Point the alias at a version; return its new state, or None where it named that version already.

    Args:
        store: The store.
        request: The request.
        version: The version.
        override: Allow a version whose content a rollback has rejected.

    Raises:
        UsageError: If the alias names another version than the person saw, there is no such version, or the alias is
            `latest`.
        QualityRefused: If the version's content was rejected and there is no override.
        IntegrityError: If a byte of the version differs from its manifest.
    """
    # `latest` names the newest version. Moved by hand, it would be wrong until the next publication.
    if request.alias == LATEST:
        raise UsageError(f"{LATEST} names the newest version by itself; promote another alias")
    if done := find_done(store, request):
        return done
    release = registry.read_release(store, request.line, version)
    _refuse_moved(store, request)
    return registry.move_alias(
        store,
        request.line,
        request.alias,
        release,
        reason=request.reason,
        # It may move between the check and here. Then this is tried again, and the check says who moved it.
        expected="" if request.current is None else _or_none(request.current),
        override=override,
        request_id=request.request_id,
    )


def rollback(store: Store, request: Request, version: str | None = None) -> Alias:
    """Move the alias back, and reject the content that it leaves; return its new state.

    Args:
        store: The store.
        request: The request.
        version: The version that the person saw it go back to; None: whichever is next.

    Raises:
        UsageError: If the alias names another version than the person saw, goes back to another, or to none.
        TryAgain: If the alias moved meanwhile.
    """
    if done := find_done(store, request):
        return done
    _refuse_moved(store, request)
    return registry.rollback(
        store,
        request.line,
        request.alias,
        reason=request.reason,
        current=request.current,
        version=version,
        request_id=request.request_id,
    )


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


def requesters(store: Store, line: str, version: str) -> set[str]:
    """Return the users of Airflow whose runs published a version: none of them may approve it."""
    begins_at = datetime.strptime(version.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
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


def _refuse_moved(store: Store, request: Request) -> None:
    """Refuse a request whose alias names another version than the person saw."""
    if request.current is None:
        return
    state, _ = registry.read_alias(store, request.line, request.alias)
    actual = state.version if state else NOTHING
    if actual != request.current:
        moved = f": {state.actor} moved it at {state.at} ({state.reason})" if state else ""
        raise UsageError(
            f"{request.line}@{request.alias}: named {request.current} when this was decided, and names {actual} "
            f"now{moved}; look at what it names now, and decide again"
        )


def _or_none(version: str) -> str | None:
    return None if version == NOTHING else version


def describe_current(store: Store, line: str, alias: str = PRODUCTION) -> str:
    """Return the version that an alias names, or `none`."""
    state, _ = registry.read_alias(store, line, alias)
    return state.version if state else NOTHING
