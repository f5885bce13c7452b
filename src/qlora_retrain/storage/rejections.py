"""Which versions an alias may not name again: by their content, by their recipe, and by whom and why that was said.

An alias's document lists its rejections. States of before this was so list hashes of contents alone: for those, who
and why is in the audit entry of the move that rejected them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime

from qlora_retrain.core.errors import Cause, IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.storage import audit, recipes, version_repair, versions
from qlora_retrain.storage.registry_documents import Alias, Rejection, Release
from qlora_retrain.storage.store import Store, root_option


def of_alias(store: Store, line: str, name: str, state: Alias | None) -> tuple[Rejection, ...]:
    """Return every rejection of an alias, the oldest first; those of older states are read from the audit trail."""
    if state is None:
        return ()
    explained = {rejection.content_hash for rejection in state.rejections}
    unexplained = [content for content in state.rejected if content not in explained]
    trail = list(audit.entries(store, line, name)) if unexplained else []
    return (*(_from_trail(store, line, trail, content) for content in unexplained), *state.rejections)


def find(store: Store, line: str, name: str, state: Alias | None, release: Release) -> Rejection | None:
    """Return the rejection that holds for a version, or None: of its content or name first, then of its recipe."""
    rejections = of_alias(store, line, name, state)
    for rejection in rejections:
        if release.version == rejection.version or release.content_hash == rejection.content_hash:
            return rejection
    recipe = recipes.key_of_version(store, release) if rejections else None
    return next((r for r in rejections if recipe is not None and r.recipe == recipe), None)


def refuse(store: Store, line: str, name: str, state: Alias | None, release: Release) -> None:
    """Refuse a version that the alias may not name.

    Raises:
        QualityRefused: With who rejected it, why, and what would have to change.
    """
    rejection = find(store, line, name, state, release)
    if rejection is None:
        return
    same = release.version == rejection.version or release.content_hash == rejection.content_hash
    subject = "it" if same else f"{rejection.version}, which the same recipe made,"
    promote = (
        f"qlora-retrain promote {line} {release.version} --alias {name} --override --reason ... {root_option(store)}"
    )
    raise QualityRefused(
        f"{release.version}: {subject} was rejected for {name} by {describe(rejection)}. A run is promoted again "
        "when its data, its base model, a setting of training or merging, or their code has changed; to promote "
        f"this one all the same, run: {promote}"
    )


def describe(rejection: Rejection) -> str:
    """Return who rejected a version, when and why."""
    return f"{rejection.actor} at {rejection.at} ({rejection.reason})"


def of_version(store: Store, line: str, version: str, *, reason: str, actor: str) -> Rejection:
    """Return the rejection of a version: of its name alone where its manifest was lost or changed."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        release = version_repair.read_remembered(store, line, version)
    except (UsageError, IntegrityError):
        return Rejection(version=version, content_hash=None, reason=reason, actor=actor, at=at)
    recipe = recipes.key_of_version(store, release)
    return Rejection(
        version=version, content_hash=release.content_hash, recipe=recipe, reason=reason, actor=actor, at=at
    )


def is_rejected_name(state: Alias, version: str) -> bool:
    """Return whether a version is rejected by its name, which ends with the beginning of its content's hash."""
    return any(rejection.version == version for rejection in state.rejections) or any(
        version.endswith(f"-{content[:12]}") for content in state.rejected
    )


def refuse_return(name: str, state: Alias | None, release: Release) -> None:
    """Raise `TryAgain` if a version was rejected after a rollback had chosen it: by one that left it meanwhile."""
    if state is not None and is_rejected_name(state, release.version):
        raise TryAgain(
            f"{name}: somebody else has just rejected {release.version}, to which this was going back",
            cause=Cause.CONFLICT,
        )


def add(state: Alias, rejection: Rejection) -> Alias:
    """Return the state with one more rejection."""
    contents = () if rejection.content_hash is None else (rejection.content_hash,)
    # The newest word on a version counts.
    others = tuple(r for r in state.rejections if r.version != rejection.version)
    return state.model_copy(
        update={
            "rejected": tuple(dict.fromkeys((*state.rejected, *contents))),
            "rejections": (*others, rejection),
        }
    )


def remove(store: Store, name: str, state: Alias, release: Release) -> Alias:
    """Return an alias's state without the rejection of a version; its recipe is rejected for no other one either."""
    recipe = recipes.key_of_version(store, release) if state.rejected or state.rejections else None
    remaining = []
    # Those of older states too: their recipes would go on to hold.
    for rejection in of_alias(store, release.line, name, state):
        if release.version == rejection.version or release.content_hash == rejection.content_hash:
            continue
        is_same = recipe is not None and rejection.recipe == recipe
        remaining.append(rejection.model_copy(update={"recipe": None}) if is_same else rejection)
    contents = tuple(content for content in state.rejected if content != release.content_hash)
    return state.model_copy(update={"rejected": contents, "rejections": tuple(remaining)})


def _from_trail(store: Store, line: str, trail: Iterable[Alias], content: str) -> Rejection:
    """Return the rejection of a content that an older state lists without who and why."""
    end = f"-{content[:12]}"
    origin = _first_state_with(trail, content)
    if origin is None:
        return Rejection(
            version=f"the version that ends with {end}", content_hash=content, reason="no audit entry says why",
            actor="somebody", at="some time",
        )  # fmt: skip
    # The move that rejected it left it. A planner may read versions, and not list them.
    version = next((move.version for move in reversed(origin.moves) if move.version.endswith(end)), end)
    recipe = None
    with contextlib.suppress(UsageError, IntegrityError):
        recipe = recipes.key_of_version(store, versions.read_release(store, line, version))
    return Rejection(
        version=version, content_hash=content, recipe=recipe, reason=origin.reason, actor=origin.actor, at=origin.at
    )


def _first_state_with(states: Iterable[Alias], content: str) -> Alias | None:
    """Return the oldest state of the newest ones that reject a content; `states` are the newest first."""
    origin = None
    for state in states:
        if content not in state.rejected:
            break
        origin = state
    return origin
