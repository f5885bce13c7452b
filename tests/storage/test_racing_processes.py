"""Eight processes publish, promote and roll back the same line at once: every move counts once, and none is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qlora_retrain.core.errors import QualityRefused, TryAgain, UsageError
from qlora_retrain.storage import audit, moves, open_store, registry
from qlora_retrain.storage.moves import Request
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Release
from qlora_retrain.storage.store import Store
from tests.storage import small_versions, visible_state
from tests.storage.small_versions import CHILD_SECONDS, LINE, files_of, listed

NUM_PROCESSES = 8


def in_processes(functions: list[Callable[[], object]]) -> None:
    """Call each function in a process of its own; all begin at the same moment."""
    start_reader, start_writer = os.pipe()
    children = []
    for function in functions:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(CHILD_SECONDS)
                os.close(start_writer)
                os.read(start_reader, 1)  # returns when the parent closes its end
                function()
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        children.append(child)
    os.close(start_reader)
    os.close(start_writer)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(functions)


def publish(store: Store, number: int) -> Release:
    """Write a version as the publish step does, whoever writes the same one at this moment; `latest` may name it."""
    release = small_versions.release_of(listed(files_of(number)), number)
    folder = registry.version_folder(LINE, release.version)
    store.copy([(f"artifacts/model/{number}/{file.path}", f"{folder}/{file.path}") for file in release.files])
    release = registry.complete_version(store, release)
    registry.move_alias(store, LINE, LATEST, release, reason="published", is_verified=True)
    return release


def race(uri: str, seed: int, num_operations: int, log: Path) -> None:
    """Do a few operations at random; write a line for each move that this process was told it made."""
    store, generator = open_store(uri), random.Random(seed)
    moved: list[int] = []
    for number in range(num_operations):
        with contextlib.suppress(TryAgain, QualityRefused, UsageError):
            release = publish(store, generator.randint(1, 6))
            request_id = f"{seed:06x}{number:06x}"
            if generator.random() < 0.6:
                request = Request(LINE, PRODUCTION, "up", None, request_id)
                move = partial(moves.promote, store, request, release.version)
            else:
                request = Request(LINE, PRODUCTION, "down", moves.describe_current(store, LINE), request_id)
                move = partial(moves.rollback, store, request)
            # Repeated, as by somebody whose answer was lost. None: the alias named that version already.
            states = [move(), move()]
            assert states[0] is None or states[0] == states[1]
            moved += {state.generation for state in states if state is not None}
    log.write_text("".join(f"{generation}\n" for generation in moved))


def check_race(store: Store, folder: Path, seed: int, num_operations: int) -> None:
    for number in range(1, 7):
        for path, data in files_of(number).items():
            store.write_if_absent(f"artifacts/model/{number}/{path}", data)
    logs = [folder / f"moves-{number}" for number in range(NUM_PROCESSES)]
    in_processes(
        [partial(race, store.uri, seed * NUM_PROCESSES + n, num_operations, logs[n]) for n in range(NUM_PROCESSES)]
    )

    visible_state.assert_nothing_false(store)
    states, faults = audit.history(store, LINE)
    assert faults == []
    trail = [state for name, state in states if name == PRODUCTION]
    # Each process was told of its own moves, and of nobody else's.
    # A request that had nothing to move is in the trail too; a promotion is told that it moved nothing.
    pairs = list(itertools.pairwise(trail))
    unmoved = {later.generation for earlier, later in pairs if later.version == earlier.version}
    answered = [s.generation for s in trail if s.generation not in unmoved or s.action != "promote"]
    assert sorted(int(line) for log in logs for line in log.read_text().split()) == answered
    assert [state.generation for state in trail] == list(range(1, len(trail) + 1))
    content = {name: release.content_hash for name, release in visible_state.versions(store).items()}
    for earlier, later in itertools.pairwise([s for s in trail if s.generation not in unmoved]):
        assert later.moves[-1].version == earlier.version
        assert content[later.version] not in earlier.rejected
        assert set(earlier.rejected) <= set(later.rejected)
    latest = registry.read_alias(store, LINE, LATEST)[0]
    assert latest is not None
    assert latest.version == max(content)


def test_eight_processes_that_publish_promote_and_roll_back_lose_no_move(store: Store, tmp_path: Path) -> None:
    check_race(store, tmp_path, 1, num_operations=4 if store.uri.startswith("file:") else 1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_in_any_race_of_eight_no_move_is_lost(store: Store, tmp_path: Path, seed: int) -> None:
    check_race(store, tmp_path, seed, num_operations=6)
