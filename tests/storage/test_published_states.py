"""Whatever publishers, people and consumers do to a line, in whichever order, and wherever they die, these hold.

An alias names a version whose every byte verifies. A generation only grows. The audit trail misses no move but the last
of a writer that died. What a rollback rejected comes back by an override alone. A pulled folder is whole.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qlora_retrain.core.errors import IntegrityError, QualityRefused, TryAgain, UsageError
from qlora_retrain.pipeline.collect import collect
from qlora_retrain.storage import audit, collection_mark, moves, open_store, pull, registry
from qlora_retrain.storage.moves import Request
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Alias, Release
from qlora_retrain.storage.store import NotFound, Store
from tests.storage import small_versions, visible_state
from tests.storage.dying_store import WRITES, Died, Fault
from tests.storage.small_versions import LINE, files_of, listed, pulled_files

LAST = 3
OVERRIDE = "a person, with --override"
NUMBERS = st.integers(1, LAST)
TWO = st.sampled_from(["first", "second"])
# The write of an operation at which its process dies, and whether after it; None: at none.
DEATHS = st.none() | st.none() | st.tuples(st.integers(1, 12), st.booleans())
# The versions' names by number, and the hashes of their contents by name; a version may have been collected.
RELEASES = {number: small_versions.release_of(listed(files_of(number)), number) for number in range(1, LAST + 1)}
NAMES = {number: release.version for number, release in RELEASES.items()}
CONTENTS = {release.version: release.content_hash for release in RELEASES.values()}
ROUNDS = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
MANY_ROUNDS = settings(ROUNDS, max_examples=300, stateful_step_count=50)


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection that died holds the next one up for a moment and not for minutes."""
    monkeypatch.setattr(collection_mark, "LEASE_SECONDS", 0.04)
    monkeypatch.setattr(collection_mark.Marker, "may_remove", lambda self: True)


def artifact_path(number: int, path: str) -> str:
    return f"artifacts/model/{number}/{path}"


def version_of(store: Store, number: int) -> Release:
    """The version of this number as the publish step writes it, or the one with its content that is there."""
    release = RELEASES[number]
    if present := registry.find_by_content(store, LINE, release.content_hash):
        registry.verify_version(store, present)
        return present
    folder = registry.version_folder(LINE, release.version)
    store.copy([(artifact_path(number, file.path), f"{folder}/{file.path}") for file in release.files])
    assert registry.first_fault(store, folder, release.files) is None
    return registry.complete_version(store, release)


class Line(RuleBasedStateMachine):
    """One line, two publishers, a person, two consumers, and whoever collects."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="line-"))
        self.store = self.new_store()
        # What each publisher read when it made its plan: the number of its version, and what production named.
        self.plans: dict[str, tuple[int, str | None]] = {}
        self.generations: dict[str, int] = {}
        self.pulled: dict[str, int] = {}
        # The aliases whose last writer may have died before it wrote the audit entry.
        self.unfinished: set[str] = set()
        self.damaged: set[str] = set()
        self.has_collected = False

    def new_store(self) -> Store:
        return open_store((self.folder / "store").as_uri())

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def train(self) -> None:
        for number in range(1, LAST + 1):
            for path, data in files_of(number).items():
                self.store.write_if_absent(artifact_path(number, path), data)
        for number in range(1, LAST):
            release = version_of(self.store, number)
            registry.move_alias(self.store, LINE, PRODUCTION, release, reason="published", is_verified=True)

    @rule(publisher=TWO, number=NUMBERS)
    def make_plan(self, publisher: str, number: int) -> None:
        alias = self.alias(PRODUCTION)
        self.plans[publisher] = number, alias.version if alias else None

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), death=DEATHS)
    def publish(self, data: st.DataObject, death: tuple[int, bool] | None) -> None:
        number, target = self.plans[data.draw(st.sampled_from(sorted(self.plans)))]

        def operation() -> None:
            release = version_of(self.store, number)
            registry.move_alias(self.store, LINE, LATEST, release, reason="published", is_verified=True)
            registry.move_alias(
                self.store, LINE, PRODUCTION, release, reason="passed", expected=target, is_verified=True
            )

        current = self.alias(PRODUCTION)
        named = current.version if current else None
        try:
            self.run(operation, death, LATEST, PRODUCTION)
        except IntegrityError:
            assert self.damaged
        except NotFound:
            assert self.has_collected
        except TryAgain:
            assert named != target
        except QualityRefused:
            assert current is not None
            assert CONTENTS[NAMES[number]] in current.rejected

    @rule(number=NUMBERS, is_overriding=st.booleans(), death=DEATHS)
    def promote(self, number: int, is_overriding: bool, death: tuple[int, bool] | None) -> None:
        version = NAMES[number]
        request = Request(LINE, PRODUCTION, OVERRIDE if is_overriding else "a person")
        current = self.alias(PRODUCTION)
        try:
            self.run(lambda: moves.promote(self.store, request, version, override=is_overriding), death, PRODUCTION)
        except IntegrityError:
            assert version in self.damaged
        except UsageError:
            assert version not in visible_state.versions(self.store)
        except QualityRefused:
            assert not is_overriding
            assert current is not None
            assert CONTENTS[NAMES[number]] in current.rejected

    @precondition(lambda self: self.alias(PRODUCTION))
    @rule(death=DEATHS)
    def roll_back(self, death: tuple[int, bool] | None) -> None:
        before = self.alias(PRODUCTION)
        assert before is not None
        request = Request(LINE, PRODUCTION, "it swears", before.version)
        try:
            self.run(lambda: moves.rollback(self.store, request), death, PRODUCTION)
        except IntegrityError:
            assert self.damaged
        except UsageError:
            return
        after = self.alias(PRODUCTION)
        assert after is not None
        if after.generation > before.generation:
            assert after.version != before.version
            assert CONTENTS[before.version] in after.rejected
            assert CONTENTS[after.version] not in before.rejected

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Somebody removes a file of a version that no alias names."""
        aliases = [self.alias(name) for name in visible_state.alias_names(self.store)]
        unnamed = sorted(visible_state.versions(self.store).keys() - {alias.version for alias in aliases if alias})
        if unnamed:
            version = data.draw(st.sampled_from(unnamed))
            self.store.delete([f"{registry.version_folder(LINE, version)}/{small_versions.WEIGHTS}"])
            self.damaged.add(version)

    @rule(consumer=TWO)
    def consume(self, consumer: str) -> None:
        destination, alias = self.folder / consumer, self.alias(PRODUCTION)
        if alias is None:
            with pytest.raises(UsageError):
                pull.pull(self.store, f"{LINE}@{PRODUCTION}", destination)
            return
        release = pull.pull(self.store, f"{LINE}@{PRODUCTION}", destination)
        assert release.version == alias.version
        (number,) = [number for number, name in NAMES.items() if name == release.version]
        assert pulled_files(destination) == files_of(number)
        assert self.pulled.get(consumer, 0) <= alias.generation
        self.pulled[consumer] = alias.generation

    @rule(death=DEATHS)
    def collect(self, death: tuple[int, bool] | None) -> None:
        self.has_collected = True
        long_after = datetime.now(UTC) + timedelta(days=400)
        self.run(lambda: collect(self.store, is_dry_run=False, at=long_after), death)

    @invariant()
    def aliases_name_whole_versions(self) -> None:
        visible_state.assert_nothing_false(self.store, self.damaged)

    @invariant()
    def generations_grow(self) -> None:
        for name in visible_state.alias_names(self.store):
            alias = self.alias(name)
            assert alias is not None
            assert alias.generation >= self.generations.get(name, 0)
            self.generations[name] = alias.generation

    @invariant()
    def the_audit_trail_is_complete(self) -> None:
        states, faults = audit.history(self.store, LINE)
        assert all(any(fault.startswith(f"{LINE}@{name}:") for name in self.unfinished) for fault in faults)
        by_name: dict[str, list[Alias]] = {}
        for name, state in states:
            by_name.setdefault(name, []).append(state)
        for trail in by_name.values():
            assert [state.generation for state in trail] == list(range(1, len(trail) + 1))
            self.check_trail(trail)

    def check_trail(self, trail: list[Alias]) -> None:
        """Every entry says where it came from, and what was rejected came back by a person's override alone."""
        for earlier, later in itertools.pairwise(trail):
            assert later.moves[-1].version == earlier.version
            assert CONTENTS[later.version] not in earlier.rejected or later.reason == OVERRIDE

    def run(self, operation: Callable[[], object], death: tuple[int, bool] | None, *aliases: str) -> None:
        """Run an operation, which may die at one of its writes."""
        if death is None:
            operation()
            return
        fault = Fault(death[0], Died, is_after=death[1], is_lasting=True)
        try:
            with fault.inject(self.store, WRITES):
                operation()
        except Died:
            self.unfinished.update(aliases)

    def alias(self, name: str) -> Alias | None:
        return registry.read_alias(self.store, LINE, name)[0]


def test_no_order_of_publishing_moving_pulling_and_dying_breaks_a_promise() -> None:
    run_state_machine_as_test(Line, settings=ROUNDS)


@pytest.mark.soak
def test_no_longer_order_of_publishing_moving_pulling_and_dying_breaks_a_promise() -> None:
    run_state_machine_as_test(Line, settings=MANY_ROUNDS)


@pytest.mark.soak
def test_no_order_breaks_a_promise_with_a_server(s3_uri: str) -> None:
    class LineOnServer(Line):
        count = 0

        def new_store(self) -> Store:
            LineOnServer.count += 1
            return open_store(f"{s3_uri}/{LineOnServer.count}")

    run_state_machine_as_test(LineOnServer, settings=settings(ROUNDS, max_examples=20))
