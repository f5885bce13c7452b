"""Collect the garbage of a store: say what would go, and remove it where that is asked for.

Each batch is marked (`storage/collection_mark.py`); then everything that can name it is read again; then manifests go,
and after them the files. So a plan that is made meanwhile, or an alias that moves, finds what it names whole or gone.
A collection that was killed leaves nothing but files that no manifest names, and the next one removes them.

Command: `qlora-retrain gc --root URI [--delete]`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from qlora_retrain.core import uris
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.pipeline import garbage
from qlora_retrain.pipeline.garbage import Item
from qlora_retrain.pipeline.named import PLAN_DAYS, read_names
from qlora_retrain.pipeline.stored_names import Documents
from qlora_retrain.storage import unfinished_uploads
from qlora_retrain.storage.collection_mark import Marker
from qlora_retrain.storage.store import Store
from qlora_retrain.storage.unfinished_uploads import UnfinishedUpload

# Whoever needs one of a batch waits until all of it is gone.
_BATCH_ITEMS = 200
# Reading plans and aliases takes longer than the mark holds: a store that hardly answers.
_MAX_ROUNDS = 3
_MAX_RUN_DAYS = 36_500


@dataclass(frozen=True, slots=True)
class Collection:
    """The result of a collection.

    Attributes:
        at: The time by which ages were counted.
        items: What was garbage, and is gone where it was to be removed.
        spared: What was named meanwhile.
        notes: What was left because it could not be decided, in sentences.
    """

    at: datetime
    items: tuple[Item, ...]
    spared: tuple[Item, ...]
    notes: tuple[str, ...]


def collect(
    store: Store,
    *,
    is_dry_run: bool,
    run_days: int = garbage.DEFAULT_RUN_DAYS,
    at: datetime | None = None,
    on_removed: Callable[[Item], None] = lambda item: None,
) -> Collection:
    """Find the garbage of a store, and remove it.

    Args:
        store: The store.
        is_dry_run: Remove and write nothing.
        run_days: The folder of a run goes after so many days.
        at: The time by which ages are counted; None: now.
        on_removed: Is told of each item that is gone.

    Raises:
        UsageError: If there is no store, `run_days` is less than a plan counts, plans are signed and this process has
            no keys of the store, or it may not list or remove something; what it may remove is removed before.
        TryAgain: If another collection is under way.
    """
    if not PLAN_DAYS <= run_days <= _MAX_RUN_DAYS:
        raise UsageError(
            f"run_days: expected {PLAN_DAYS} at least, as long as a plan counts, and {_MAX_RUN_DAYS} at most, found "
            f"{run_days}"
        )
    _refuse_empty(store)
    at, documents = at or datetime.now(UTC), Documents(store)
    names = read_names(documents, at)
    if is_dry_run:
        items = garbage.find(documents, names, at, run_days)
        return Collection(at, (*items, *map(_upload_item, _old_uploads(store, at))), (), names.notes)

    marker = Marker(store)
    marker.begin()
    # Found after the mark, since an earlier collection may have been at work until now.
    names = read_names(documents, at)
    removed: list[Item] = []
    spared: list[Item] = []
    refusals: list[UsageError] = []
    try:
        for batch in _batches(garbage.find(documents, names, at, run_days)):
            going, staying = _mark_batch(documents, marker, batch, at)
            spared += staying
            # Only this has to happen soon after the mark: from here on nobody finds what goes.
            batch_removed, problems = _remove(store, going)
            removed += batch_removed
            refusals += problems
            for item in batch_removed:
                on_removed(item)

        for upload in _old_uploads(store, at):
            unfinished_uploads.abort(store, [upload])
            removed.append(_upload_item(upload))
            on_removed(removed[-1])
        if refusals:
            raise UsageError(f"{refusals[0]}; {len(refusals)} of the items could not be removed, and all others were")
    except (UsageError, KeyboardInterrupt):
        # No request is under way. After any other error one may be, so the mark stays until it is old.
        marker.end()
        raise
    marker.end()
    return Collection(at, tuple(removed), tuple(spared), names.notes)


def _refuse_empty(store: Store) -> None:
    """Refuse a misspelled root: a timer would report for years that there is nothing to do."""
    # The root itself may not be listed by the role `gc`, and a disk has folders of its own there, such as lost+found.
    if not any(True for folder in uris.STORE_FOLDERS for _ in store.children(folder)):
        raise UsageError(f"{store.uri}: expected the root of a store, found nothing there; correct the root")


def _mark_batch(
    documents: Documents, marker: Marker, batch: Sequence[Item], at: datetime
) -> tuple[list[Item], list[Item]]:
    """Mark a batch; return what nothing names by now, which goes, and what stays."""
    for _ in range(_MAX_ROUNDS):
        marker.write({item.name for item in batch if item.name})
        names = read_names(documents, at)
        if not marker.may_remove():
            continue
        going = [item for item in batch if not garbage.is_named(item, names)]
        return going, [item for item in batch if item not in going]
    raise TryAgain(
        f"{documents.store.uri}: reading the plans and aliases takes longer than a collection may take; run again",
        cause=Cause.THROTTLED,
    )


def _remove(store: Store, items: Sequence[Item]) -> tuple[Sequence[Item], list[UsageError]]:
    """Remove items; return those that are gone, and an error for each that this process may not remove."""
    try:
        store.delete([path for item in items for path in item.first])
        store.delete([path for item in items for path in item.files])
        return items, []
    except UsageError:
        # Of one item, perhaps: of a line that this role does not know, or with a link that somebody put there.
        removed, refusals = [], []
    for item in items:
        try:
            store.delete(item.first)
            store.delete(item.files)
            removed.append(item)
        except UsageError as error:
            refusals.append(error)
    return removed, refusals


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _BATCH_ITEMS):
        yield items[start : start + _BATCH_ITEMS]


def _old_uploads(store: Store, at: datetime) -> list[UnfinishedUpload]:
    limit = (at - timedelta(days=garbage.ATTEMPT_DAYS)).timestamp()
    return [upload for upload in unfinished_uploads.find(store) if upload.began_at < limit]


def _upload_item(upload: UnfinishedUpload) -> Item:
    return Item("upload", upload.path, "an upload that was never finished", "", (), (upload.path,), upload.size_bytes)
