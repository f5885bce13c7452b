"""Versions are written once, aliases move atomically, and the audit trail misses no move, whenever a writer dies."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store, registry
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
    with pytest.raises(TryAgain, match=f"named nothing when the plan was made and {first.version} now"):
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


# --- dying between any two writes


class Died(BaseException):
    """The process is gone: nothing below may handle it."""


class MortalStore:
    """A store whose process dies before, or right after, its n-th write."""

    WRITES = ("write_if_absent", "swap", "upload", "copy", "delete")

    def __init__(self, store: Store, dies_at: int, *, after: bool) -> None:
        self.uri, self._store, self._left, self._after = store.uri, store, dies_at, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return self._counted(method) if name in self.WRITES else method

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                raise Died
            result = method(*arguments)
            if self._left == 0:
                raise Died
            return result

        return call

    @property
    def finished(self) -> bool:
        return self._left > 0


def assert_nothing_false(store: Store) -> None:
    """No version without its files, no alias that names something absent, no move missing before the last."""
    for name in store.children(f"models/{LINE}/versions"):
        folder = registry.version_folder(LINE, name)
        sizes_bytes = {e.path.removeprefix(f"{folder}/"): e.size_bytes for e in store.list(folder)}
        if "manifest.json" not in sizes_bytes:
            continue
        release = registry.read_release(store, LINE, name)
        for file in release.files:
            assert hashing.sha256_bytes(store.read(f"{folder}/{file.path}").data) == file.sha256
    for document in store.children(f"models/{LINE}/aliases"):
        name = document.removesuffix(".json")
        state = alias_state(store, name)
        registry.read_release(store, LINE, state.version, sha256=state.manifest_sha256)
        assert set(range(1, state.generation)) <= set(audit(store, name))


def deaths() -> Iterator[tuple[int, bool]]:
    return ((n, after) for n in range(1, 40) for after in (False, True))


def test_a_publisher_that_dies_at_any_write_leaves_nothing_false_and_a_rerun_completes(
    line: Any, tmp_path: Any, small_steps: dict[str, Callable[..., StepResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, before = tmp_path / "store", tmp_path / "before"
    store, plan = open_store(root.as_uri()), make_plan.make_plan(line, root.as_uri())
    for name in list(small_steps)[:-1]:
        assert execute.run_step(plan, name, lambda name=name: small_steps[name]).code == 0  # type: ignore[misc]
    # Every death begins from this store, in which all but `publish` is done.
    root.rename(before)
    num_deaths = 0
    for n, after in deaths():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        mortal = MortalStore(store, n, after=after)
        with monkeypatch.context() as patch:
            patch.setattr(execute, "open_store", lambda uri, mortal=mortal: mortal)
            with contextlib.suppress(Died):
                execute.run_step(plan, "publish", lambda: small_steps["publish"])
        assert_nothing_false(store)
        assert execute.run_step(plan, "publish", lambda: small_steps["publish"]).code == 0
        assert_published_once(store, plan)
        if mortal.finished:
            break
        num_deaths += 1
    # There are that many writes: copies, documents, manifest, two aliases with their audit entries, the artifact.
    assert num_deaths >= 2 * 6


def assert_published_once(store: Store, plan: Plan) -> None:
    assert_nothing_false(store)
    assert len(list(store.children(f"models/{LINE}/versions"))) == 1
    for name in (LATEST, PRODUCTION):
        assert alias_state(store, name).generation == 1
        assert list(audit(store, name)) == [1]
        assert len(audit(store, name)[1]) == 1
    release = artifact.find_manifest(store, "release", plan.step("publish").key)
    assert release is not None
    assert release.numbers["published"] is True
    assert release.numbers["moved"] is True
    document = json.loads(store.read(f"{release.prefix}/release.json").data)
    assert document["version"] == alias_state(store, PRODUCTION).version


def test_a_mover_that_dies_at_any_write_is_completed_by_the_next(tmp_path: Any) -> None:
    for n, after in deaths():
        store = open_store((tmp_path / f"store-{n}-{after}").as_uri())
        first, second = version(store, 1), version(store, 2)
        move(store, PRODUCTION, first)
        mortal = MortalStore(store, n, after=after)
        # The next mover must write the audit entry that the dead one could not.
        with contextlib.suppress(Died):
            move(mortal, PRODUCTION, second)  # type: ignore[arg-type]
        assert_nothing_false(store)
        move(store, PRODUCTION, second)
        assert alias_state(store, PRODUCTION).generation == 2
        assert {g: len(states) for g, states in audit(store, PRODUCTION).items()} == {1: 1, 2: 1}
        if mortal.finished:
            return


def test_a_swap_that_always_conflicts_gives_up_with_try_again(store: Store) -> None:
    class Busy:
        uri = store.uri

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def swap(self, path: str, data: bytes, expected: str | None) -> str:
            raise Conflict(path)

    with pytest.raises(TryAgain, match="other writers keep moving it"):
        move(Busy(), PRODUCTION, version(store, 1))  # type: ignore[arg-type]
