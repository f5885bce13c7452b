"""What an operator repeats at night ends in the same state, and no alias moves to what is not what was published."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.storage import audit, last_move, moves, open_store, probes, registry, reject, repair
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Alias, Release
from qlora_retrain.storage.store import Store
from tests.storage import small_versions
from tests.storage.small_versions import LINE, WEIGHTS


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def releases(local_store: Store) -> list[Release]:
    """Three versions that production named, one after the other."""
    return [small_versions.publish(local_store, number) for number in (1, 2, 3)]


def request(current: str | None = None) -> moves.Request:
    return moves.Request(LINE, PRODUCTION, "it swears", current)


def production(store: Store) -> Alias:
    state, _ = registry.read_alias(store, LINE, PRODUCTION)
    assert state is not None
    return state


class Flaky:
    """A store of which one method fails after it did its work, and before it, as when an answer is lost."""

    def __init__(self, store: Store, method: str, path: str, *, works: bool) -> None:
        self.uri, self._store, self._method, self._path, self._works = store.uri, store, method, path, works

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(path: str, *arguments: Any) -> Any:
            if self._works:
                method(path, *arguments)
            raise TryAgain(f"{path}: the server is busy; run the same command again")

        return (lambda p, *a: call(p, *a) if self._path in p else method(p, *a)) if name == self._method else method


def test_a_rollback_that_is_repeated_goes_back_once(local_store: Store, releases: list[Release]) -> None:
    first, second, third = (release.version for release in releases)
    state = moves.rollback(local_store, request(third))
    assert moves.rollback(local_store, request(third)) == state
    assert (state.version, state.action, state.rejected) == (second, "rollback", (releases[2].content_hash,))
    assert moves.rollback(local_store, request(second)).version == first


def test_a_rollback_after_a_rollback_has_to_say_what_it_leaves(local_store: Store, releases: list[Release]) -> None:
    second, third = releases[1].version, releases[2].version
    moves.rollback(local_store, request())
    with pytest.raises(UsageError) as caught:
        moves.rollback(local_store, request())
    same, further = (line for line in str(caught.value).split("\n") if line.startswith("  qlora-retrain rollback"))
    assert same.endswith(f"--from {third}")
    assert further.endswith(f"--from {second}")
    assert "--reason 'it swears'" in same
    assert production(local_store).generation == 4


def test_two_people_who_roll_back_at_once_go_back_once(
    local_store: Store, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(store: Store) -> None:
        registry.rollback(store, LINE, PRODUCTION, reason="somebody else's")

    monkeypatch.setattr(probes, "ensure_conditional_writes", meanwhile)
    with pytest.raises(TryAgain, match=f"--from {releases[2].version}$"):
        moves.rollback(local_store, request())
    assert moves.rollback(local_store, request(releases[2].version)).version == releases[1].version
    assert production(local_store).generation == 4


def test_a_rollback_does_not_go_to_what_is_rejected_while_it_reads(
    local_store: Store, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others promote the version that it goes to and leave it again, so the alias names the same one as before."""
    first, second, third = (release.version for release in releases)
    read = registry.read_remembered

    def read_beside_others(store: Store, line: str, version: str, **options: Any) -> Release:
        with monkeypatch.context() as patch:
            patch.setattr(registry, "read_remembered", read)
            if production(store).version == third and not production(store).rejected:
                moves.promote(store, request(third), second)
                moves.rollback(store, request(second))
        return read(store, line, version, **options)

    monkeypatch.setattr(registry, "read_remembered", read_beside_others)
    with pytest.raises(TryAgain, match=f"just rejected {second}.*run: qlora-retrain rollback .* --from {third}"):
        moves.rollback(local_store, request(third))
    assert production(local_store).version == third
    # The command that was printed.
    assert moves.rollback(local_store, request(third)).version == first


def test_a_state_of_an_older_release_that_rolled_back_is_recognised(
    local_store: Store, releases: list[Release]
) -> None:
    moves.rollback(local_store, request())
    old = production(local_store).model_copy(update={"action": None, "rejections": ()})
    assert last_move.find_rollback(local_store, LINE, PRODUCTION, old) == old
    without_rejection = old.model_copy(update={"rejected": ()})
    assert last_move.find_rollback(local_store, LINE, PRODUCTION, without_rejection) is None


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_a_75_prints_the_command_that_ends_in_the_same_state(
    local_store: Store, releases: list[Release], verb: str, works: bool
) -> None:
    first, third = releases[0].version, releases[2].version
    expected = first if verb == "promote" else releases[1].version

    def move(store: Any, current: str | None) -> None:
        if verb == "promote":
            moves.promote(store, request(current), first)
        else:
            moves.rollback(store, request(current))

    with pytest.raises(TryAgain, match=f"run: qlora-retrain {verb} .*--from {third}$") as caught:
        move(Flaky(local_store, "swap", "/aliases/", works=works), None)
    # The command as it was typed might make a further move.
    assert "the same command" not in str(caught.value)
    for _ in range(2):
        move(local_store, third)
        assert (production(local_store).version, production(local_store).generation) == (expected, 4)


def test_a_move_whose_audit_entry_failed_is_done_and_the_next_one_writes_it(
    local_store: Store, releases: list[Release], capsys: pytest.CaptureFixture[str]
) -> None:
    flaky: Any = Flaky(local_store, "write_if_absent", "/audit/00000004", works=False)
    state = moves.rollback(flaky, request())
    error = capsys.readouterr().err
    assert f"names {releases[1].version} now" in error
    assert "nothing is to be repeated" in error
    assert audit.history(local_store, LINE)[1] == [f"{LINE}@production: the entry of generation 4 is missing"]
    moves.rollback(local_store, request(releases[2].version))
    assert audit.read_entry(local_store, audit.entry_path(LINE, PRODUCTION, state)) == state
    assert not audit.history(local_store, LINE)[1]


class Died(BaseException):
    """The process is gone: nothing below may handle it."""


class Mortal:
    """A store whose process dies before, or right after, its n-th write."""

    def __init__(self, store: Store, dies_at: int, *, after: bool) -> None:
        self.uri, self._store, self.left, self._after = store.uri, store, dies_at, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self._after:
                raise Died
            result = method(*arguments)
            if self.left == 0:
                raise Died
            return result

        return call if name in ("write_if_absent", "swap", "copy", "delete") else method


@pytest.mark.parametrize("verb", ["promote", "rollback", "repair"])
def test_a_command_that_is_killed_at_any_write_ends_in_the_same_state_when_it_is_repeated(
    tmp_path: Path, verb: str
) -> None:
    for number in range(1, 20):
        for after in (False, True):
            store = open_store((tmp_path / f"{number}-{after}").as_uri())
            first, second, third = (small_versions.publish(store, n).version for n in (1, 2, 3))
            if verb == "repair":
                store.delete([f"{registry.version_folder(LINE, third)}/{WEIGHTS}"])
                store.delete([audit.alias_path(LINE, PRODUCTION)])

            def run(store: Any, first: str = first, third: str = third) -> None:
                if verb == "promote":
                    moves.promote(store, request(third), first)
                elif verb == "rollback":
                    moves.rollback(store, request(third))
                else:
                    repair.repair(store, LINE, reason="a test")

            mortal: Any = Mortal(store, number, after=after)
            with contextlib.suppress(Died):
                run(mortal)
            for _ in range(2):
                run(store)
            state = production(store)
            assert (state.version, state.generation) == (first if verb == "promote" else second, 4)
            assert [r.version for r in state.rejections] == ([third] if verb == "rollback" else [])
            assert not audit.history(store, LINE)[1]
        if mortal.left > 0:
            return
    raise AssertionError("a command has fewer writes")


def test_the_first_move_of_a_machine_probes_a_bucket_and_the_next_ones_remember_it(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    probed: list[str] = []
    monkeypatch.setattr("qlora_retrain.storage.s3.S3Store.probe", lambda store: probed.append(store.uri))
    for uri in (s3_uri, s3_uri, f"{s3_uri}/other"):
        probes.ensure_conditional_writes(open_store(uri))
    assert probed == [s3_uri, f"{s3_uri}/other"]


@contextlib.contextmanager
def refused(store: Store, match: str) -> Iterator[None]:
    before = production(store)
    with pytest.raises(IntegrityError, match=match):
        yield
    assert production(store) == before


@pytest.mark.parametrize("verb", ["promote", "rollback"])
@pytest.mark.parametrize("deed", ["weights", "manifest", "no manifest"])
def test_no_alias_moves_to_a_version_that_is_not_what_the_audit_trail_remembers(
    local_store: Store, releases: list[Release], verb: str, deed: str
) -> None:
    target = releases[1]
    folder = Path(local_store.uri.removeprefix("file://")) / registry.version_folder(LINE, target.version)
    if deed == "weights":
        (folder / WEIGHTS).write_bytes(b"x")
    elif deed == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        # Another weight, and a manifest that says so.
        (folder / WEIGHTS).write_bytes(b"x")
        files = {path: (folder / path).read_bytes() for path in small_versions.files_of(2)}
        document = json.loads((folder / "manifest.json").read_text())
        document["files"] = [file.model_dump() for file in small_versions.listed(files)]
        (folder / "manifest.json").write_text(json.dumps(document))
    reason = {"weights": "no artifact of its run", "manifest": "expected sha256", "no manifest": "had one"}[deed]
    with refused(local_store, reason):
        if verb == "promote":
            moves.promote(local_store, request(), target.version)
        else:
            moves.rollback(local_store, request(releases[2].version))


def test_a_version_that_is_gone_can_be_left(local_store: Store, releases: list[Release]) -> None:
    local_store.delete([f"{registry.version_folder(LINE, releases[2].version)}/manifest.json"])
    state = moves.rollback(local_store, request())
    assert (state.version, state.rejected) == (releases[1].version, ())
    # By its name, since nothing tells its content any more.
    assert [(r.version, r.content_hash) for r in state.rejections] == [(releases[2].version, None)]


def test_a_version_is_rejected_by_hand_and_allowed_again(local_store: Store, releases: list[Release]) -> None:
    first, second, third = (release.version for release in releases)
    state = reject.reject(local_store, request(), second)
    assert state is not None
    assert (state.version, state.action, state.generation) == (third, "reject", 4)
    assert reject.reject(local_store, request(), second) is None
    with pytest.raises(QualityRefused, match=rf"{second}: it was rejected for production by os:.*\(it swears\)"):
        moves.promote(local_store, request(), second)
    with pytest.raises(UsageError, match=f"names {third} now; a rollback leaves it .* --from {third}"):
        reject.reject(local_store, request(), third)

    # A rollback passes it over.
    assert moves.rollback(local_store, request(third)).version == first
    allowed = reject.unreject(local_store, request(), second)
    assert allowed is not None
    assert allowed.rejected == (releases[2].content_hash,)
    assert reject.unreject(local_store, request(), second) is None
    assert moves.promote(local_store, request(), second)
    assert [state.action for _, state in audit.history(local_store, LINE)[0]] == [
        "promote", "promote", "promote", "reject", "rollback", "unreject", "promote",
    ]  # fmt: skip


def test_a_recipe_that_is_allowed_again_leaves_other_contents_rejected(local_store: Store) -> None:
    step = {"merge_adapter": {"rank": 8}}
    recipe = {"steps": step, "code": {"merge_adapter": "c"}, "inputs": {"merge_adapter": {"adapter": "k"}}}
    files = {"recipe.json": json.dumps(recipe).encode()}
    # The second and the third are retrainings of one recipe.
    first, second, third = (
        small_versions.publish(local_store, number, small_versions.files_of(number) | (files if number > 1 else {}))
        for number in (1, 2, 3)
    )
    moves.rollback(local_store, request(third.version))
    # A rollback goes to what was there, of whatever recipe; a promotion afterwards does not.
    assert production(local_store).version == second.version
    moves.promote(local_store, request(), first.version)
    with pytest.raises(QualityRefused, match=f"{second.version}: {third.version}, which the same recipe made, was"):
        moves.promote(local_store, request(), second.version)

    assert reject.unreject(local_store, request(), second.version)
    assert moves.promote(local_store, request(), second.version)
    assert production(local_store).rejected == (third.content_hash,)
    with pytest.raises(QualityRefused, match=f"{third.version}: it was rejected"):
        moves.promote(local_store, request(), third.version)


def sequenced(store: Store, number: int, sequence: int | None, stamp: str) -> Release:
    """A version of a planner whose clock says `stamp`."""
    release = small_versions.release_of((), number)
    version = f"{stamp}-{number:012x}"
    return registry.complete_version(store, release.model_copy(update={"version": version, "sequence": sequence}))


def test_latest_follows_the_order_of_plans_and_not_a_clock_that_ran_ahead(local_store: Store) -> None:
    def offer(release: Release) -> str | None:
        registry.move_alias(local_store, LINE, LATEST, release, reason="published")
        state, _ = registry.read_alias(local_store, LINE, LATEST)
        return state.version if state else None

    older = sequenced(local_store, 1, None, "20990101T000000Z")
    assert offer(older) == older.version
    assert registry.next_sequence(local_store, LINE) == 2
    ahead = sequenced(local_store, 2, 2, "20980101T000000Z")
    beside = sequenced(local_store, 3, 2, "20260101T000000Z")
    assert offer(ahead) == ahead.version  # planned after the version of an older release, whatever that one's time
    assert offer(beside) == ahead.version  # planned side by side
    after = sequenced(local_store, 4, registry.next_sequence(local_store, LINE), "20260102T000000Z")
    assert offer(after) == after.version
    # A run that was planned before this one ends after it.
    assert offer(ahead) == after.version


def test_a_lost_alias_is_no_line_without_versions(local_store: Store, releases: list[Release]) -> None:
    local_store.delete([audit.alias_path(LINE, PRODUCTION)])
    with pytest.raises(IntegrityError, match=f"is missing, and the audit trail has generation 3.*repair {LINE} --root"):
        registry.read_alias(local_store, LINE, PRODUCTION)
