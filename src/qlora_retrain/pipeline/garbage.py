"""Find the garbage of a store: what nothing names any more, and what attempts that died have left.

What a document can name (an artifact, checkpoints, a version, a run) is garbage once nothing that counts names it. What
nothing ever named (a dead attempt, an unfinished upload) is garbage by its age alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from qlora_retrain.lm import checkpoints
from qlora_retrain.pipeline.named import PLAN_DAYS, Names, list_runs
from qlora_retrain.pipeline.plan import plan_path
from qlora_retrain.pipeline.stored_names import STAMPED, Documents, is_hash, time_of
from qlora_retrain.storage import collection_mark
from qlora_retrain.storage.store import Entry, is_valid_path

# Longer than any step uploads its files, and than a person leaves a run that failed.
ATTEMPT_DAYS = 7
DEFAULT_RUN_DAYS = 180
Kind = Literal["version", "artifact", "attempt", "scratch", "run", "upload"]


@dataclass(frozen=True, slots=True)
class Item:
    """Something to remove.

    Attributes:
        kind: Its kind.
        path: Its folder in the store; of an upload, its file.
        reason: Why it is garbage.
        name: The key, version or run by which plans and aliases name it; empty: nothing names such a thing.
        first: The files that are removed before all others: without them it does not exist.
        files: The other files.
        size_bytes: The size of all of them.
    """

    kind: Kind
    path: str
    reason: str
    name: str
    first: tuple[str, ...]
    files: tuple[str, ...]
    size_bytes: int


def find(documents: Documents, names: Names, at: datetime, run_days: int) -> list[Item]:
    """Return all garbage but uploads, in the order in which it is removed.

    Args:
        documents: The documents of the store.
        names: What is named.
        at: The time.
        run_days: The folder of a run goes after so many days.
    """
    # A version before its artifacts: while it is there, it can be repaired from them.
    return [
        *_versions(documents, names, at),
        *_artifacts(documents, names, at),
        *_scratch(documents, names, at),
        *_runs(documents, names, at, run_days),
    ]


def is_named(item: Item, names: Names) -> bool:
    """Return whether something names an item by now."""
    if item.kind == "version":
        line = names.lines.get(item.path.split("/")[1])
        return line is not None and (item.name in line.reasons or item.name.partition("-")[0] in names.stamps)
    if item.kind == "run":
        return item.name in names.runs
    return item.name in names.hashes


def _versions(documents: Documents, names: Names, at: datetime) -> Iterator[Item]:
    for line, versions in names.lines.items():
        for name, entries in sorted(versions.files.items()):
            folder = f"models/{line}/versions/{name}"
            if name in versions.reasons or not STAMPED.fullmatch(name) or name.partition("-")[0] in names.stamps:
                continue
            if name not in versions.complete and not _is_old(entries, at, PLAN_DAYS):
                continue
            reason = (
                "older than the versions that stay" if name in versions.complete else "its manifest was not written"
            )
            moving = collection_mark.moving_path(line, name)
            yield _item("version", folder, reason, name, entries, [f"{folder}/manifest.json"], [moving])


def _artifacts(documents: Documents, names: Names, at: datetime) -> Iterator[Item]:
    for (artifact, key), entries in _by_folder(documents.store.list("artifacts"), 2):
        folder = f"artifacts/{artifact}/{key}"
        if not is_hash(key):
            continue
        manifest = next((entry for entry in entries if entry.path == f"{folder}/_manifest.json"), None)
        # Even where no plan names it: a step that died before its plan was found again may have just made it.
        if manifest is not None and key not in names.hashes:
            if _is_old(entries, at, ATTEMPT_DAYS):
                reason = "no plan that counts and no version that stays names it"
                yield _item("artifact", folder, reason, key, entries, [manifest.path])
            continue

        # The manifest names the attempt that won. In one that cannot be read, no attempt is known to have lost.
        text = "" if manifest is None else documents.read(manifest)
        attempts = _by_folder((entry for entry in entries if entry is not manifest), 3)
        for (_, _, attempt), attempt_entries in attempts:
            is_dead = manifest is None or (f'"{attempt}"' not in text and '"attempt"' in text)
            if is_dead and _is_old(attempt_entries, at, ATTEMPT_DAYS):
                reason = "an attempt that made no artifact"
                yield _item("attempt", f"{folder}/{attempt}", reason, "", attempt_entries, [])


def _scratch(documents: Documents, names: Names, at: datetime) -> Iterator[Item]:
    for (step, key), entries in _by_folder(documents.store.list("scratch"), 2):
        if is_hash(key) and key not in names.hashes and _is_old(entries, at, ATTEMPT_DAYS):
            # Without its marker no checkpoint looks complete while its files disappear.
            markers = [entry.path for entry in entries if entry.path.endswith(f"/{checkpoints.MARKER}")]
            reason = "no plan that counts names these checkpoints"
            yield _item("scratch", f"scratch/{step}/{key}", reason, key, entries, markers)


def _runs(documents: Documents, names: Names, at: datetime, run_days: int) -> Iterator[Item]:
    for run, entries in sorted(list_runs(documents.store).items()):
        is_run = STAMPED.fullmatch(run) and run not in names.runs
        if is_run and at - time_of(run) > timedelta(days=run_days) and _is_old(entries, at, PLAN_DAYS):
            yield _item("run", f"runs/{run}", f"older than {run_days} days", run, entries, [plan_path(run)])


def _item(
    kind: Kind,
    path: str,
    reason: str,
    name: str,
    entries: Iterable[Entry],
    first: Iterable[str],
    further: Iterable[str] = (),
) -> Item:
    sizes_bytes = {entry.path: entry.size_bytes for entry in entries if is_valid_path(entry.path)}
    leading = tuple(path for path in first if path in sizes_bytes)
    files = tuple(path for path in sizes_bytes if path not in leading)
    return Item(kind, path, reason, name, leading, (*files, *further), sum(sizes_bytes.values()))


def _by_folder(entries: Iterable[Entry], depth: int) -> Iterator[tuple[tuple[str, ...], list[Entry]]]:
    """Yield the files below each folder that is so many levels below the first one; a file that lies higher is none."""
    folders: Mapping[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        parts = entry.path.split("/")
        if len(parts) > depth + 1:
            folders[tuple(parts[1 : depth + 1])].append(entry)
    yield from sorted(folders.items())


def _is_old(entries: Iterable[Entry], at: datetime, days: int) -> bool:
    """Return whether nothing was written for so many days."""
    return max(entry.modified_at for entry in entries) < (at - timedelta(days=days)).timestamp()
