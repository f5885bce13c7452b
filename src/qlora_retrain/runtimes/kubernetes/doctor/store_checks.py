"""Whether the store would do what a run asks of it: answer, take writes, keep their conditions; and its clock.

It writes and deletes two small files below `.probe/`, as every plan does. The account is the doctor's own, so its role
must be the planner's; what the steps' roles may do is not seen from here.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from qlora_retrain.core import uris
from qlora_retrain.core.errors import Problem
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault, unknown
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import NotFound, Store

# S3 refuses requests that are 15 minutes off; run ids and the order of versions are UTC times of several machines.
MAX_SKEW_SECONDS = 60
_NOT_REACHED = "the store was not reached, see above"


class StoreExamination:
    """The checks of one store, each of which needs the one before it.

    Args:
        root: The store's URI.
        now: The clock of this machine.

    Attributes:
        skew_seconds: How far its server's clock is ahead of this machine's; None where no server named a time.
    """

    def __init__(self, root: str, now: Callable[[], datetime]) -> None:
        self._root, self._now, self._name = root, now, uris.mask_secrets(root)
        self._store: Store | None = None
        self._is_writable = False
        self.skew_seconds: float | None = None

    def check_reach(self) -> Iterator[Finding]:
        """The store answers."""
        try:
            store = open_store(self._root)
            self._observe_dates(store)
            with contextlib.suppress(NotFound):
                store.read(f".probe/{uuid.uuid4().hex}")
        except Problem as problem:
            remedy = "check the root, the endpoint, the region, the credentials and the network policies"
            yield fault("store", self._name, "that it answers", str(problem), remedy)
        else:
            self._store = store

    def check_write(self) -> Iterator[Finding]:
        """The doctor's role may write and delete below `.probe/`."""
        if self._store is None:
            yield unknown("write", _NOT_REACHED)
            return
        path = f".probe/{uuid.uuid4().hex}"
        try:
            self._store.write_if_absent(path, b"the doctor was here")
            self._store.delete([path])
        except Problem as problem:
            remedy = "attach the planner's policy to this account's role (qlora-retrain policy CONFIG --role planner)"
            yield fault("write", f"{self._name}/.probe/", "the right to write and to delete", str(problem), remedy)
        else:
            self._is_writable = True

    def check_conditions(self) -> Iterator[Finding]:
        """The store refuses a write whose condition does not hold."""
        if self._store is None or not self._is_writable:
            yield unknown("conditions", "without a write nothing can be tried, see above")
            return
        try:
            self._store.probe()
        except Problem as problem:
            remedy = "use a server that honours If-Match and If-None-Match; without them two runs overwrite each other"
            yield fault("conditions", self._name, "that it refuses a write in vain", str(problem), remedy)

    def _observe_dates(self, store: Store) -> None:
        """Remember the time that a server names in its answers; a folder names none."""
        client: Any = getattr(store, "client", None)
        if client is not None:
            client.meta.events.register("after-call.s3", self._compare_clocks)

    def _compare_clocks(self, http_response: Any = None, **_: Any) -> None:
        if http_response is not None:
            self.skew_seconds = skew_seconds(http_response.headers.get("date", ""), self._now())


def clock_findings(name: str, skew: float | None) -> Iterator[Finding]:
    """Yield a fault where a server's clock and this machine's differ by more than a minute."""
    if skew is not None and abs(skew) > MAX_SKEW_SECONDS:
        actual = f"{abs(skew):.0f} seconds {'ahead of' if skew > 0 else 'behind'} this node's"
        remedy = "let the nodes and the server take the time from NTP; S3 refuses requests that are 15 minutes off"
        yield fault(
            "clock", f"the clock of {name}", f"at most {MAX_SKEW_SECONDS} seconds of difference", actual, remedy
        )


def skew_seconds(date: str, now: datetime) -> float | None:
    """Return how far the time in a Date header is ahead of this machine's; None where the header has none."""
    try:
        return (parsedate_to_datetime(date) - now).total_seconds()
    except (TypeError, ValueError):
        return None
