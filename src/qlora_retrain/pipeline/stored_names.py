"""Read what documents of a store name: hashes, versions and runs, whatever release of this code wrote them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from qlora_retrain.storage.store import Entry, NotFound, Store, is_valid_path

# How the names of runs and of versions look.
STAMPED = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}")
_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(slots=True)
class Documents:
    """Reads documents of a store, each state of one once.

    Attributes:
        store: The store.
    """

    store: Store
    _bytes: dict[Entry, str] = field(default_factory=dict)

    def read(self, entry: Entry) -> str:
        """Return a listed document as text; empty where it was removed meanwhile."""
        if entry not in self._bytes:
            try:
                data = self.store.read(entry.path).data if is_valid_path(entry.path) else b""
            except NotFound:
                return ""
            self._bytes[entry] = data.decode("utf-8", errors="replace")
        return self._bytes[entry]


def time_of(stamped: str) -> datetime:
    """Return the time at which the name of a run or of a version begins; the latest possible for one that is no time.

    Args:
        stamped: A name as `STAMPED` matches it.
    """
    try:
        return datetime.strptime(stamped[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def hashes_in(*texts: str) -> set[str]:
    """Return every hash in documents."""
    return {match for text in texts for match in _HASH.findall(text)}


def stamped_in(*texts: str) -> set[str]:
    """Return every name of a version or a run in documents."""
    return {match for text in texts for match in STAMPED.findall(text)}


def is_hash(name: str) -> bool:
    """Return whether a name is a hash, as keys are: what has another name, this code did not write."""
    return _HASH.fullmatch(name) is not None
