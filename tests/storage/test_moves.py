"""A move that a person asks for: of the state that they saw, once, and refused with who moved the alias meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.storage import actor, audit, last_move, moves, registry, reject
from qlora_retrain.storage.registry import PRODUCTION, Alias, Release
from qlora_retrain.storage.store import Store

LINE = "intents"


@pytest.fixture(autouse=True)
def nobody_triggered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that a test sets for the audit trail is forgotten after it."""
    monkeypatch.setattr(actor, "_orchestrator", "")


def version(store: Store, number: int) -> Release:
    """A published version without files; a larger number is a newer one."""
    content = hashing.sha256_json(number)
    stamp = f"{datetime.now(UTC) - timedelta(days=9 - number):%Y%m%dT%H%M%SZ}"
    return registry.complete_version(
        store,
        Release(
            line=LINE,
            version=f"{stamp}-{content[:12]}",
            content_hash=content,
            created_at=stamp,
            files=(),
            adapter_key="a",
            judgement="j",
            keys={},
            base={},
            numbers={},
            provenance={},
        ),
    )


def request(current: str | None = None, request_id: str | None = None, alias: str = PRODUCTION) -> moves.Request:
    return moves.Request(LINE, alias, "a test", current, request_id)


def state(store: Store, alias: str = PRODUCTION) -> Alias:
    alias_state, _ = registry.read_alias(store, LINE, alias)
    assert alias_state is not None
    return alias_state


def test_the_first_version_is_promoted_from_nothing_and_the_next_from_it(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    assert moves.promote(store, request("none"), first.version)
    assert moves.promote(store, request(first.version), second.version)
    assert state(store).version == second.version
    assert moves.rollback(store, request(second.version), first.version).version == first.version


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_request_about_another_state_is_refused_with_who_moved_the_alias(store: Store, action: str) -> None:
    first, second, third = (version(store, number) for number in (1, 2, 3))
    actor.name_orchestrator("airflow:carol")
    moves.promote(store, request(), first.version)
    registry.move_alias(store, LINE, PRODUCTION, second, reason="newer and better")
    move = {
        "promote": lambda: moves.promote(store, request(first.version), third.version),
        "rollback": lambda: moves.rollback(store, request(first.version)),
    }[action]
    with pytest.raises(UsageError) as caught:
        move()
    message = str(caught.value)
    assert f"named {first.version} when this was decided, and names {second.version} now: airflow:carol via " in message
    assert "(newer and better)" in message
    assert state(store).version == second.version


def test_a_rollback_that_would_go_elsewhere_is_refused(store: Store) -> None:
    versions = [version(store, number) for number in (1, 2, 3)]
    for release in versions:
        moves.promote(store, request(), release.version)
    with pytest.raises(UsageError, match=f"goes back to {versions[1].version}, and {versions[0].version} was asked"):
        moves.rollback(store, request(versions[2].version), versions[0].version)


def test_a_rollback_of_a_state_that_was_left_is_tried_again_and_moves_nothing(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    for release in (first, second):
        moves.promote(store, request(), release.version)
    # As where another writer moves the alias after the check of what it names.
    with pytest.raises(TryAgain, match="production named v0 when"):
        registry.rollback(store, LINE, PRODUCTION, reason="x", current="v0")
    assert state(store).version == second.version


def test_a_request_that_is_repeated_moves_once_also_after_others_have_moved_the_alias(store: Store) -> None:
    first, second, third = (version(store, number) for number in (1, 2, 3))
    moves.promote(store, request("none"), first.version)
    repeated = request(first.version, "ab" * 8)
    moved = moves.promote(store, repeated, second.version)
    assert moved is not None
    again = moves.promote(store, repeated, second.version)
    assert again == moved

    registry.move_alias(store, LINE, PRODUCTION, third, reason="later")
    assert moves.promote(store, repeated, second.version) == moved
    back = request(third.version, "cd" * 8)
    assert moves.rollback(store, back) == moves.rollback(store, back)
    assert state(store).generation == 4


def test_a_request_that_had_nothing_to_move_moves_nothing_later_either(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    for release in (first, second, first):
        moves.promote(store, request(), release.version)
    repeated = request(request_id="ab" * 8)
    assert moves.promote(store, repeated, first.version) is None
    assert (state(store).version, state(store).moves[-1].version) == (first.version, second.version)
    moves.promote(store, request(first.version), second.version)
    assert moves.promote(store, repeated, first.version) is None
    assert state(store).version == second.version

    # The same of a rollback, which would reject a version that is right.
    moves.rollback(store, request(second.version))
    back = request(second.version, "cd" * 8)
    assert moves.rollback(store, back).version == first.version
    assert last_move.find_rollback(store, LINE, PRODUCTION, state(store))
    with pytest.raises(UsageError, match="the last move was a rollback already"):
        moves.rollback(store, request())
    moves.promote(store, request(), second.version, override=True)
    assert moves.rollback(store, back).version == first.version
    assert state(store).version == second.version
    assert audit.history(store, LINE)[1] == []


def test_a_promotion_of_what_a_rollback_went_back_to_leaves_the_rollback_the_last_move(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    for release in (first, second):
        moves.promote(store, request(), release.version)
    moves.rollback(store, request(second.version))
    assert moves.promote(store, request(request_id="ab" * 8), first.version) is None
    assert moves.rollback(store, request(second.version)).version == first.version
    with pytest.raises(UsageError, match="was used before, for another move"):
        moves.rollback(store, request(second.version, "ab" * 8))


@pytest.mark.parametrize("request_id", ["monday", "../../../x", "AB" * 8, "ab", ""])
def test_an_id_that_is_no_name_of_an_audit_entry_is_refused_before_anything_moves(request_id: str) -> None:
    with pytest.raises(UsageError, match="expected 12 to 64 hexadecimal digits"):
        request(request_id=request_id)


def test_a_version_without_its_manifest_is_rejected_by_name_so_that_a_rollback_passes_it_by(store: Store) -> None:
    releases = [version(store, number) for number in (1, 2, 3)]
    for release in releases:
        moves.promote(store, request(), release.version)
    lost = releases[1].version
    store.delete([f"models/{LINE}/versions/{lost}/manifest.json"])
    with pytest.raises(IntegrityError, match="has no manifest, and an alias or the audit trail says that it had one"):
        moves.rollback(store, request(releases[2].version))

    assert reject.reject(store, request(), lost) is not None
    assert reject.reject(store, request(), lost) is None
    with pytest.raises(IntegrityError, match="has no manifest"):
        reject.unreject(store, request(), lost)
    with pytest.raises(UsageError, match="has no version v0"):
        reject.reject(store, request(), "v0")
    assert moves.rollback(store, request(releases[2].version)).version == releases[0].version


def test_a_try_that_died_before_its_audit_entry_is_found_and_the_entry_written(store: Store) -> None:
    first = version(store, 1)
    repeated = request("none", "ab" * 8)
    moves.promote(store, repeated, first.version)
    entry = audit.entry_path(LINE, PRODUCTION, state(store))
    store.delete([entry])
    assert moves.promote(store, repeated, first.version) == state(store)
    assert audit.read_entry(store, entry) == state(store)


def test_what_a_rollback_rejected_is_refused_for_a_person_too(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    moves.promote(store, request(), first.version)
    moves.promote(store, request(), second.version)
    moves.rollback(store, request(second.version))
    with pytest.raises(QualityRefused, match="--override"):
        moves.promote(store, request(first.version), second.version)
    with pytest.raises(UsageError, match="names the newest version by itself"):
        moves.promote(store, request(alias="latest"), second.version)


def test_the_users_whose_runs_published_a_version_are_known(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    for user, release in (("alice", first), ("b%20ob@x", second), ("carol", second)):
        actor.name_orchestrator(f"airflow:{user}")
        for alias in ("latest", "staging"):
            registry.move_alias(store, LINE, alias, release, reason="published")
    actor.name_orchestrator("airflow-run:scheduled")
    registry.move_alias(store, LINE, "staging", first, reason="again")
    registry.move_alias(store, LINE, "staging", second, reason="again")
    assert moves.requesters(store, LINE, first.version) == {"alice"}
    assert moves.requesters(store, LINE, second.version) == {"b ob@x"}  # carol's run moved nothing

    # A planner whose clock is years ahead.
    actor.name_orchestrator("airflow:dave")
    ahead = version(store, 9999)
    registry.move_alias(store, LINE, "staging", ahead, reason="published")
    assert moves.requesters(store, LINE, ahead.version) == {"dave"}
