"""A trigger that watches a line's data: it emits an event when the files are other ones than at the last event.

It lists the files and reads none of them. It changes nothing in the source; Airflow's own triggers for files and queues
delete what they have noticed. What it saw last is kept in Airflow's database, by asset, so another triggerer goes on
where this one ended.

An event waits until the files are the same at two looks, because a copy of many files takes time. It is emitted again
where the triggerer ends in the seconds after it. Such a run finds nothing new and ends as `unchanged`.

Credentials: the triggerer lists the source by its own role; it needs no other right.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from qlora_retrain.core.errors import Problem

if TYPE_CHECKING:
    from qlora_retrain.storage.source_listing import SourceLister, SourceListing

# Under this key Airflow's store for the state of an asset has the digest of the last listing.
STATE_KEY = "listing"
_SETTLE_SECONDS = 60.0
# Files that change all the time, such as a log, start a run after so many looks.
_MAX_SETTLE_LOOKS = 60
# Airflow writes an event to its database about a second after it was emitted.
_PERSIST_SECONDS = 5.0


class NewDataTrigger(BaseEventTrigger):  # type: ignore[misc]
    """Watch the files of a source.

    Args:
        asset: The name of the asset that it is for. Airflow takes equal triggers for one, with the assets of all.
        uri: The source, in a folder or in S3.
        files: Globs of the files that count.
        check_seconds: How often they are listed.
        settle_seconds: For how long the files must stay as they are.
    """

    def __init__(
        self, *, asset: str, uri: str, files: list[str], check_seconds: float, settle_seconds: float = _SETTLE_SECONDS
    ) -> None:
        super().__init__()
        self.asset, self.uri, self.files = asset, uri, files
        self._lister: SourceLister | None = None
        self.check_seconds, self.settle_seconds = check_seconds, min(settle_seconds, check_seconds)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what Airflow makes the trigger from again; it is the same at every parse."""
        return f"{__name__}.{type(self).__name__}", {
            "asset": self.asset,
            "uri": self.uri,
            "files": self.files,
            "check_seconds": self.check_seconds,
            "settle_seconds": self.settle_seconds,
        }

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Emit an event for each change, for as long as the line's DAG is active; a fault is logged and tried again."""
        while True:
            try:
                listing = await self._changed_listing()
            # Whatever it is: with the trigger's end nobody would watch, until Airflow is started again.
            except Exception as error:  # noqa: BLE001
                self.log.warning("%s", _describe(error))
                listing = None
            if listing is not None:
                yield TriggerEvent({"source": self.uri, "files": listing.num_files, "bytes": listing.size_bytes})
                await asyncio.sleep(min(_PERSIST_SECONDS, self.check_seconds))
                await self._remember(listing)
            await asyncio.sleep(self.check_seconds)

    async def _changed_listing(self) -> SourceListing | None:
        """Return the listing if it is another one than the last; the first look of all only remembers what is there."""
        assert self.asset_state_store is not None
        listing = await asyncio.to_thread(self._list)
        last = await self.asset_state_store.aget(STATE_KEY)
        if last is None:
            await self.asset_state_store.aset(STATE_KEY, listing.digest)
            self.log.info("%s: %s files are there; the next change starts a run", self.uri, f"{listing.num_files:,}")
        if last in (None, listing.digest):
            return None

        for _ in range(_MAX_SETTLE_LOOKS):
            await asyncio.sleep(self.settle_seconds)
            before, listing = listing, await asyncio.to_thread(self._list)
            if before.digest == listing.digest:
                break
        # A file may have come and gone.
        return None if listing.digest == last else listing

    async def _remember(self, listing: SourceListing) -> None:
        """Keep what was seen; if that fails, the event is emitted once more."""
        assert self.asset_state_store is not None
        try:
            await self.asset_state_store.aset(STATE_KEY, listing.digest)
        except Exception as error:  # noqa: BLE001 - as in `run`
            self.log.warning("%s", _describe(error))

    def _list(self) -> SourceListing:
        """List the source as a plan would: the platform says anew at each look where sources may lie."""
        from qlora_retrain.config import platform
        from qlora_retrain.runtimes.airflow.dag_run import store_root
        from qlora_retrain.storage.source_listing import SourceLister

        self._lister = self._lister or SourceLister(self.uri, self.files)
        root = store_root()
        return self._lister.list(platform.load().access(root), root)


def _describe(error: Exception) -> str:
    # A library's own message may hold a URL with a password, ours never do.
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = str(error) if isinstance(error, Problem) else f"{type(error).__name__} in {place.name}"
    return f"the data was not looked at, and will be again: {reason}"
