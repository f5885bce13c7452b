"""The operations on published versions that tests interrupt: each is a function in `OPERATIONS`.

Each gets an empty store, puts there what the operation begins from, and returns the operation, which can be repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from qlora_retrain.core.errors import Exit, TryAgain, UsageError
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.storage import audit, moves, repair
from qlora_retrain.storage.moves import Request
from qlora_retrain.storage.store import Store
from tests.storage import small_versions
from tests.storage.dying_store import Operation
from tests.storage.small_versions import LINE

Begin = Callable[[Store, pytest.FixtureRequest], Operation]


def publish(store: Store, request: pytest.FixtureRequest) -> Operation:
    """The publish step of a line's first run."""
    return publish_step(store, request)


def publish_further(store: Store, request: pytest.FixtureRequest) -> Operation:
    """The publish step of a run with another recipe, after the first run."""
    publish_step(store, request)(store)
    return publish_step(store, request, "train.learning_rate=1e-3")


def publish_step(store: Store, request: pytest.FixtureRequest, *overrides: str) -> Operation:
    """Make a plan, run its other steps, and return the publish step."""
    line, steps = request.getfixturevalue("line"), request.getfixturevalue("small_steps")
    plan = make_plan.make_plan(line, store.uri, overrides=overrides)
    for name in list(steps)[:-1]:
        assert execute.run_step(plan, name, lambda name=name: steps[name]).code == 0  # type: ignore[misc]

    def operation(store: Store) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(execute, "open_store", lambda uri: store)
            ending = execute.run_step(plan, "publish", lambda: steps["publish"])
        if ending.code == Exit.TRY_AGAIN:
            raise TryAgain(ending.reason or "")
        assert ending.code == 0, ending.reason

    return operation


def promote(store: Store, request: pytest.FixtureRequest) -> Operation:
    """`qlora-retrain promote`."""
    first, second = small_versions.publish(store, 1), small_versions.publish(store, 2)
    moves.promote(store, Request(LINE, "production", "begin", second.version), first.version)
    return lambda store: moves.promote(store, Request(LINE, "production", "a test"), second.version)


def promote_once(store: Store, request: pytest.FixtureRequest) -> Operation:
    """`qlora-retrain promote --from VERSION --request ID`, as the page of an approval sends it."""
    first, second = small_versions.publish(store, 1), small_versions.publish(store, 2)
    moves.promote(store, Request(LINE, "production", "begin", second.version), first.version)
    repeated = Request(LINE, "production", "a test", first.version, "ab" * 8)
    return lambda store: moves.promote(store, repeated, second.version)


def roll_back_once(store: Store, request: pytest.FixtureRequest) -> Operation:
    """`qlora-retrain rollback --from VERSION --request ID`."""
    releases = [small_versions.publish(store, number) for number in (1, 2, 3)]
    repeated = Request(LINE, "production", "a test", releases[2].version, "ab" * 8)
    return lambda store: moves.rollback(store, repeated)


def roll_back_from(store: Store, request: pytest.FixtureRequest) -> Operation:
    """`qlora-retrain rollback --from VERSION`."""
    releases = [small_versions.publish(store, number) for number in (1, 2, 3)]

    def operation(store: Store) -> None:
        # A refusal because the alias was moved already is an answer too, if what was asked for is done.
        with contextlib.suppress(UsageError):
            moves.rollback(store, Request(LINE, "production", "a test", releases[2].version))

    return operation


def roll_back(store: Store, request: pytest.FixtureRequest) -> Operation:
    """`qlora-retrain rollback`, and where it is refused the command that makes sure of the last one."""
    releases = [small_versions.publish(store, number) for number in (1, 2, 3)]

    def operation(store: Store) -> None:
        try:
            moves.rollback(store, Request(LINE, "production", "a test"))
        except UsageError:
            moves.rollback(store, Request(LINE, "production", "a test", releases[2].version))

    return operation


def repair_alias(store: Store, request: pytest.FixtureRequest) -> Operation:
    """`qlora-retrain models repair`, where an alias's file is lost."""
    for number in (1, 2, 3):
        small_versions.publish(store, number)
    store.delete([audit.alias_path(LINE, "production")])
    return lambda store: repair.repair(store, LINE, reason="a test")


# A further operation, such as one that removes or mends, is a function and a line here.
OPERATIONS: dict[str, Begin] = {
    "publish": publish,
    "publish a further version": publish_further,
    "promote": promote,
    "promote --from --request": promote_once,
    "rollback --from --request": roll_back_once,
    "rollback --from": roll_back_from,
    "rollback": roll_back,
    "repair": repair_alias,
}
