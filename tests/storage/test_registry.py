"""Versions are written once, aliases move atomically, and the audit trail misses no move.

`test_interrupted.py` lets writers die.
"""

from __future__ import annotations

import os
import pwd
import threading
from typing import Any

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Alias, Release
from qlora_retrain.storage.store import Conflict, Store

LINE = "intents"


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


def version(store: Store, number: int) -> Release:
    """A published version without files; `number` orders them in time."""
    content = hashing.sha256_json(number)
    return registry.complete_version(
        store,
        Release(
            line=LINE,
            version=f"202601{number + 1:02d}T000000Z-{content[:12]}",
            content_hash=content,
            created_at="now",
            files=(),
            adapter_key="a",
            judgement="j",
            keys={},
            base={},
            numbers={},
            provenance={},
        ),
    )


def move(store: Store, name: str, release: Release, **options: Any) -> Alias | None:
    return registry.move_alias(store, LINE, name, release, reason="a test", **options)


def alias_state(store: Store, name: str) -> Alias:
    alias, _ = registry.read_alias(store, LINE, name)
    assert alias is not None
    return alias


def audit(store: Store, name: str) -> dict[int, list[Alias]]:
    """Every audit entry of an alias, by generation."""
    entries: dict[int, list[Alias]] = {}
    for entry in store.list(f"models/{LINE}/audit"):
        if f"-{name}-" in entry.path:
            state = Alias.model_validate_json(store.read(entry.path).data)
            entries.setdefault(state.generation, []).append(state)
    return entries


def test_every_move_of_a_run_says_why_a_person_started_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_retrain.storage.actor._run_reason", "new labels")
    move(store, PRODUCTION, version(store, 1))
    assert alias_state(store, PRODUCTION).reason == "a test; the run's reason: new labels"
    assert [state.reason for state in audit(store, PRODUCTION)[1]] == ["a test; the run's reason: new labels"]


def test_the_actor_is_the_operating_systems_user_whatever_the_environment_says(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "somebody-else")
    move(store, PRODUCTION, version(store, 1))
    actor = alias_state(store, PRODUCTION).actor
    assert actor.startswith(f"os:{pwd.getpwuid(os.geteuid()).pw_name}@")


def test_an_alias_that_was_never_set_says_nothing(store: Store) -> None:
    assert registry.read_alias(store, LINE, PRODUCTION) == (None, None)


def test_each_move_raises_the_generation_and_remembers_where_it_came_from(store: Store) -> None:
    versions = [version(store, i) for i in range(13)]
    for i, release in enumerate(versions):
        moved = move(store, PRODUCTION, release)
        assert moved is not None
        assert (moved.generation, moved.version) == (i + 1, release.version)
    state = alias_state(store, PRODUCTION)

    assert [m.version for m in state.moves] == [r.version for r in versions[2:12]]  # the last ten
    assert state.manifest_sha256 == registry.read_release(store, LINE, versions[-1].version).sha256
    assert {g: [s.version for s in states] for g, states in audit(store, PRODUCTION).items()} == {
        i + 1: [r.version] for i, r in enumerate(versions)
    }


def test_moving_to_where_it_is_moves_nothing(store: Store) -> None:
    release = version(store, 1)
    move(store, PRODUCTION, release)
    assert move(store, PRODUCTION, release) is None
    assert alias_state(store, PRODUCTION).generation == 1


def test_latest_never_goes_back_in_time(store: Store) -> None:
    old, new = version(store, 1), version(store, 2)
    move(store, LATEST, new)
    assert move(store, LATEST, old) is None
    assert alias_state(store, LATEST).version == new.version


def test_an_alias_moves_only_if_it_names_what_was_expected(store: Store) -> None:
    first, second, third = (version(store, i) for i in range(3))
    assert move(store, PRODUCTION, first, expected=None) is not None
    with pytest.raises(TryAgain, match=f"named nothing when this was decided and names {first.version} now"):
        move(store, PRODUCTION, second, expected=None)

    move(store, PRODUCTION, second, expected=first.version)
    with pytest.raises(TryAgain, match="plan again"):
        move(store, PRODUCTION, third, expected=first.version)
    assert alias_state(store, PRODUCTION).version == second.version


def test_a_rollback_goes_back_and_rejects_what_it_leaves(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    move(store, PRODUCTION, first)
    move(store, PRODUCTION, second)
    back = registry.rollback(store, LINE, PRODUCTION, reason="it swears")

    assert (back.version, back.generation, back.rejected) == (first.version, 3, (second.content_hash,))
    with pytest.raises(QualityRefused, match="--override"):
        move(store, PRODUCTION, second)

    again = move(store, PRODUCTION, second, override=True)
    assert again is not None
    assert (again.version, again.rejected) == (second.version, ())


def test_a_second_rollback_never_returns_to_what_the_first_rejected(store: Store) -> None:
    releases = [version(store, i) for i in range(3)]
    for release in releases:
        move(store, PRODUCTION, release)
    registry.rollback(store, LINE, PRODUCTION, reason="bad")

    assert registry.rollback(store, LINE, PRODUCTION, reason="bad too").version == releases[0].version
    assert set(alias_state(store, PRODUCTION).rejected) == {releases[1].content_hash, releases[2].content_hash}
    with pytest.raises(UsageError, match="no earlier version"):
        registry.rollback(store, LINE, PRODUCTION, reason="all bad")


def test_there_is_nothing_to_roll_back_on_the_first_version_or_latest(store: Store) -> None:
    with pytest.raises(UsageError, match="no earlier version"):
        registry.rollback(store, LINE, PRODUCTION, reason="x")
    move(store, PRODUCTION, version(store, 1))
    with pytest.raises(UsageError, match="no earlier version"):
        registry.rollback(store, LINE, PRODUCTION, reason="x")
    with pytest.raises(UsageError, match="newest version"):
        registry.rollback(store, LINE, LATEST, reason="x")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Prod", "2026", "20260101T000000Z-abc", "x" * 33])
def test_a_name_that_is_no_alias_is_refused(store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="an alias is"):
        move(store, name, version(store, 1))


def test_a_manifest_of_another_version_is_refused(store: Store) -> None:
    first, second = version(store, 1), version(store, 2)
    path = f"{registry.version_folder(LINE, first.version)}/manifest.json"
    store.swap(path, second.model_dump_json(indent=1).encode(), store.read(path).tag)
    with pytest.raises(IntegrityError, match="is the manifest of"):
        registry.read_release(store, LINE, first.version)


def test_a_user_without_a_name_can_move_an_alias(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(uid: int) -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    moved = move(store, PRODUCTION, version(store, 1))
    assert moved is not None
    assert moved.actor.startswith(f"os:user {os.geteuid()}@")


def test_in_a_race_of_eight_every_move_counts_once_and_is_in_the_audit_trail(store: Store) -> None:
    releases = [version(store, i) for i in range(8)]
    barrier = threading.Barrier(8)
    moved: list[Alias] = []
    gave_up: list[TryAgain] = []

    def move_production(release: Release) -> None:
        barrier.wait()
        try:
            state = move(store, PRODUCTION, release)
        except TryAgain as problem:
            gave_up.append(problem)
        else:
            assert state is not None
            moved.append(state)

    threads = [threading.Thread(target=move_production, args=[r]) for r in releases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(moved) + len(gave_up) == 8
    assert sorted(s.generation for s in moved) == list(range(1, len(moved) + 1))
    assert alias_state(store, PRODUCTION).generation == len(moved)
    by_generation = {s.generation: [s] for s in moved}
    assert audit(store, PRODUCTION) == by_generation


def test_in_a_race_of_eight_latest_ends_at_the_newest(store: Store) -> None:
    releases = [version(store, i) for i in range(8)]
    barrier = threading.Barrier(8)

    def move_latest(release: Release) -> None:
        barrier.wait()
        move(store, LATEST, release)

    threads = [threading.Thread(target=move_latest, args=[r]) for r in releases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alias_state(store, LATEST).version == releases[-1].version
    states = [entries[0] for _, entries in sorted(audit(store, LATEST).items())]
    assert [s.version for s in states] == sorted(s.version for s in states)


def test_a_swap_that_always_conflicts_gives_up_with_try_again(store: Store) -> None:
    class Busy:
        uri = store.uri

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def swap(self, path: str, data: bytes, expected: str | None) -> str:
            raise Conflict(path)

    with pytest.raises(TryAgain, match="other writers keep moving it"):
        move(Busy(), PRODUCTION, version(store, 1))  # type: ignore[arg-type]
