"""Whether a store honours conditional writes: tried before the first move of an alias, and remembered on this machine.

A plan tries it each time, since gigabytes of work follow. A move is one small write, and often an urgent one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from qlora_retrain.storage import planner_memory
from qlora_retrain.storage.store import Store

_KIND = "probed-stores"


def ensure_conditional_writes(store: Store) -> None:
    """Try the store's conditional writes, unless this machine has done so before.

    Raises:
        UsageError: If the store does not honour them.
    """
    # A folder is written under a lock of our own.
    if not store.uri.startswith("s3:"):
        return
    # The same bucket's name may stand for another server tomorrow.
    client: Any = getattr(store, "client", None)
    memory = planner_memory.place(_KIND, store.uri, str(client.meta.endpoint_url) if client else "")
    if planner_memory.read(memory) is None:
        store.probe()
        planner_memory.write(memory, datetime.now(UTC).isoformat(timespec="seconds"))
