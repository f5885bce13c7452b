"""What a collection of garbage is about to remove, written where a plan and a move of an alias look before they go on.

    gc/mark.json                             compare-and-swap; names keys, versions and runs
    models/<line>/moving/<version>.json      a move of an alias to that version; it counts for a day

Whoever begins to use something writes that first (a plan, a move), and reads the mark after it. A collection writes the
mark first, and reads plans, aliases and moves after it. So one of the two sees the other, whatever the order: the
collection leaves what it sees named, and the other one waits until the mark is gone. Time decides in one case alone: a
collection that was killed holds nobody up for longer than `LEASE_SECONDS`.

The mark makes others wait, and never decides what is removed.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.core import signals
from qlora_retrain.core.errors import Cause, Problem, TryAgain, UsageError
from qlora_retrain.storage.store import Conflict, NotFound, Store

MARK_PATH = "gc/mark.json"
# A collection begins to remove what a mark names only in the first half of this time, by its own clock.
LEASE_SECONDS = 480.0
_POLL_SECONDS = 1.0
# A mark of this age, by the clocks of two machines, is one of a collection that was killed.
_DEAD_AFTER = timedelta(hours=1)
_MAX_ROUNDS = 8


class Mark(BaseModel):
    """The document of the mark.

    Attributes:
        id: Another one in each mark.
        collection: The collection that wrote it; empty: none is under way.
        host: The machine that it runs on, for people.
        at: The time, by the clock of that machine.
        names: The keys, versions and runs that it is about to remove.
    """

    model_config = ConfigDict(frozen=True)
    id: str
    collection: str
    host: str
    at: str
    names: tuple[str, ...]

    @property
    def is_old(self) -> bool:
        """Whether it is so old that its collection must have been killed."""
        try:
            return datetime.now(UTC) - datetime.fromisoformat(self.at) > _DEAD_AFTER
        except (ValueError, TypeError):
            return False


def read_mark(store: Store) -> tuple[Mark | None, str | None]:
    """Return the mark and its tag; a document that is none names nothing."""
    try:
        document = store.read(MARK_PATH)
    except NotFound:
        return None, None
    try:
        return Mark.model_validate_json(document.data), document.tag
    except ValidationError:
        return None, document.tag


@dataclass(slots=True)
class Marker:
    """Writes the marks of one collection.

    Attributes:
        store: The store.
        collection: The id of the collection.
    """

    store: Store
    collection: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _tag: str | None = None
    _began_at: float = 0.0

    def begin(self) -> None:
        """Take the mark, so that this is the only collection of the store.

        Raises:
            TryAgain: If another collection is under way.
        """
        earlier, self._tag = read_mark(self.store)
        if earlier is not None and earlier.collection and not earlier.is_old:
            _say(f"waiting for the collection on {earlier.host}, which wrote its mark at {earlier.at}")
            deadline = time.monotonic() + LEASE_SECONDS
            while time.monotonic() < deadline:
                time.sleep(min(_POLL_SECONDS, LEASE_SECONDS / 4))
                current, self._tag = read_mark(self.store)
                if current is None or not current.collection:
                    break
                if current.id != earlier.id:
                    raise _another(current)
        self.write(())

    def write(self, names: Collection[str]) -> None:
        """Say what is removed next, in place of what was said before.

        Raises:
            TryAgain: If another collection took the mark, since this one did not go on for too long.
        """
        self._began_at = time.monotonic()
        self._swap(self.collection, names)

    def may_remove(self) -> bool:
        """Return whether what the mark names may still be removed; after a long pause it is written again first."""
        return time.monotonic() - self._began_at < LEASE_SECONDS / 2

    def end(self) -> None:
        """Say that no collection is under way."""
        self._swap("", ())

    def _swap(self, collection: str, names: Collection[str]) -> None:
        mark = Mark(
            id=uuid.uuid4().hex,
            collection=collection,
            host=platform.node(),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            names=tuple(sorted(names)),
        )
        try:
            self._tag = self.store.swap(MARK_PATH, mark.model_dump_json(indent=1).encode(), self._tag)
        except Conflict:
            raise _another(read_mark(self.store)[0]) from None


def wait_until_unmarked(store: Store, names: Collection[str], dead_id: str | None = None) -> str | None:
    """Wait while a collection is about to remove something of these names.

    Args:
        store: The store.
        names: The names.
        dead_id: A mark that an earlier call waited for. If it is still there, its collection was killed.

    Returns:
        The id of the mark that was waited for, None if there was none. What it named may be gone.

    Raises:
        TryAgain: If one mark after the other names them.
    """
    names, mark_id = set(names), None
    began_at = since = time.monotonic()
    while True:
        mark, _ = read_mark(store)
        if mark is None or mark.is_old or mark.id == dead_id or names.isdisjoint(mark.names):
            return mark_id
        now = time.monotonic()
        if mark_id is None:
            _say(f"waiting for the collection of garbage on {mark.host}, which is about to remove what this needs")
        if mark.id != mark_id:
            mark_id, since = mark.id, now
        if now - since >= LEASE_SECONDS:
            return mark_id  # its collection was killed, and removes nothing by this mark any more
        if now - began_at >= 2 * LEASE_SECONDS:
            raise _another(mark)
        time.sleep(min(_POLL_SECONDS, LEASE_SECONDS / 4))


def moving_path(line: str, version: str) -> str:
    """Return the path of the document of a move to a version."""
    return f"models/{line}/moving/{version}.json"


def swap_alias(store: Store, line: str, version: str, path: str, data: bytes, expected: str | None) -> None:
    """Swap an alias's document, so that it never names a version which a collection is removing.

    Args:
        store: The store.
        line: The line.
        version: The version that the document names.
        path: The alias's document.
        data: Its new bytes.
        expected: The tag of the document now; None: there is none.

    Raises:
        Conflict: If another writer moved the alias.
        UsageError: If the version was collected meanwhile.
        TryAgain: If collections or other writers are in the way again and again.
    """
    moving = moving_path(line, version)
    mark_id = None
    _announce(store, moving)
    while (mark_id := wait_until_unmarked(store, [version], mark_id)) is not None:
        # A collection that took an old announcement of this move away may have taken this one, too.
        _announce(store, moving)

    # A version goes with its manifest first, so it is whole as long as that is there.
    manifest = f"models/{line}/versions/{version}/manifest.json"
    try:
        store.read_start(manifest, 1)
    except NotFound:
        raise UsageError(
            f"{store.uri}/{manifest}: was removed by a collection of garbage just now; choose another version, or run "
            "the line again"
        ) from None
    store.swap(path, data, expected)
    # The alias has moved, and keeps the version by itself from now on. A document that is left counts for a day.
    try:
        store.delete([moving])
    except signals.StoppedBySignal:
        raise
    except Problem as error:
        _say(f"{moving} was not removed: {error}")


def _announce(store: Store, path: str) -> None:
    """Write the document of a move anew, since an old one does not count."""
    data = json.dumps({"id": uuid.uuid4().hex, "at": datetime.now(UTC).isoformat(timespec="seconds")}).encode()
    for _ in range(_MAX_ROUNDS):
        try:
            tag = store.read(path).tag
        except NotFound:
            tag = None
        # Another mover of the same version has removed or replaced it meanwhile.
        with contextlib.suppress(Conflict):
            store.swap(path, data, tag)
            return
    raise TryAgain(f"{store.uri}/{path}: other writers keep moving it; run again", cause=Cause.CONFLICT)


def _say(text: str) -> None:
    # Not on stdout, which a program may read.
    print(text, file=sys.stderr, flush=True)


def _another(mark: Mark | None) -> TryAgain:
    where = f" on {mark.host}, since {mark.at}" if mark else ""
    return TryAgain(f"another collection of garbage is under way{where}; run again later", cause=Cause.CONFLICT)
