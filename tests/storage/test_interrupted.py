"""Publishing, promoting and rolling back, interrupted at any call and repeated twice, end as if nothing had happened.

Here are some of the calls, so that this takes seconds; `make soak` has every one, on both backends.
"""

from __future__ import annotations

import pytest

from qlora_retrain.core.errors import TryAgain
from qlora_retrain.storage import audit, open_store, s3
from qlora_retrain.storage.store import Store
from tests.storage import dying_store, faulty_server
from tests.storage.dying_store import Interruption
from tests.storage.operations import OPERATIONS
from tests.storage.small_versions import LINE

WAYS: dict[str, Interruption] = {
    "dies before a write": dying_store.dies(is_after=False),
    "dies after a write": dying_store.dies(is_after=True),
    "is killed": dying_store.is_killed,
    "a call fails": dying_store.fails(),
    "an answer is lost": dying_store.fails(is_after=True),
    "the store is gone": dying_store.fails(is_lasting=True),
    "an answer is lost, then the store is gone": dying_store.fails(is_after=True, is_lasting=True),
}
# Of a server alone: the requests below the calls fail.
SERVER_WAYS: dict[str, Interruption] = {
    **{f"every n-th request: {fault}": faulty_server.fails_every(fault) for fault in faulty_server.FAULTS},
    **{f"from the n-th request on: {fault}": faulty_server.is_gone(fault) for fault in faulty_server.FAULTS},
}
# Of the many writes of a publication, the short form tries these.
EVERY = {"publish": 13, "publish a further version": 37}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(s3, "PAUSE_SECONDS", 0)


def check(store: Store, request: pytest.FixtureRequest, operation: str, way: str, every: int = 1) -> int:
    interruption = (WAYS | SERVER_WAYS)[way]
    return dying_store.check(store, OPERATIONS[operation](store, request), interruption, every=every)


@pytest.mark.parametrize("way", ["dies before a write", "dies after a write"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_dies_at_a_write_is_completed_by_whoever_repeats_it(
    root_uri: str, request: pytest.FixtureRequest, operation: str, way: str
) -> None:
    check(open_store(root_uri), request, operation, way, EVERY.get(operation, 1))


@pytest.mark.parametrize(
    ("operation", "way", "every"),
    [
        ("publish", "an answer is lost", 29),
        ("rollback --from --request", "an answer is lost", 7),
        ("promote", "the store is gone", 7),
    ],
)
def test_what_a_store_interrupts_is_completed_by_whoever_repeats_it(
    root_uri: str, request: pytest.FixtureRequest, operation: str, way: str, every: int
) -> None:
    check(open_store(root_uri), request, operation, way, every)


@pytest.mark.parametrize(
    ("operation", "way", "every"),
    [
        ("promote", "is killed", 19),
        ("rollback --from --request", "every n-th request: busy", 8),
        ("publish", "from the n-th request on: answer lost", 250),
    ],
)
def test_what_a_server_or_the_system_interrupts_is_completed_by_whoever_repeats_it(
    s3_uri: str, request: pytest.FixtureRequest, operation: str, way: str, every: int
) -> None:
    check(open_store(s3_uri), request, operation, way, every)


def test_a_publication_ends_with_the_audit_entries_that_failed_at_first(
    root_uri: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(root_uri)
    operation = OPERATIONS["publish"](store, request)
    write_if_absent, failed = store.write_if_absent, set[str]()

    def fail_once(path: str, data: bytes) -> str:
        if "/audit/" in path and path not in failed:
            failed.add(path)
            raise TryAgain("a test's fault")
        return write_if_absent(path, data)

    monkeypatch.setattr(store, "write_if_absent", fail_once)
    operation(store)
    assert len(failed) == 2
    assert not audit.history(store, LINE)[1]


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_interruption_is_completed_by_whoever_repeats_it(
    store: Store, request: pytest.FixtureRequest, operation: str, way: str
) -> None:
    check(store, request, operation, way)


@pytest.mark.soak
@pytest.mark.parametrize("way", SERVER_WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_fault_of_a_server_is_outlasted_or_completed(
    s3_uri: str, request: pytest.FixtureRequest, operation: str, way: str
) -> None:
    check(open_store(s3_uri), request, operation, way)
