"""Which versions of a line stay, and why.

All stay while an alias is lost or damaged. Otherwise those stay whatever their age that an alias names, named in its
last moves (a rollback goes there) or rejected, that a plan that counts names, that somebody is moving an alias to, and
the anchor of each that stays. Of the others the newest `publish.keep.versions` stay, and those younger than
`publish.keep.days`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from qlora_retrain.config.publish import KeepConfig
from qlora_retrain.core.aliases import is_alias_name
from qlora_retrain.pipeline.stored_names import Documents, hashes_in, stamped_in, time_of
from qlora_retrain.storage import audit
from qlora_retrain.storage.store import Entry

# An announced move counts for so long.
_MOVE_DAYS = 1


@dataclass(frozen=True, slots=True)
class LineVersions:
    """The versions of a line.

    Attributes:
        files: The files of each version, by its name; of one without a manifest too.
        reasons: Why a version stays, by its name.
        complete: The versions that have a manifest.
        manifests: The manifests of those that stay, as text.
        notes: What could not be decided, in sentences.
    """

    files: Mapping[str, list[Entry]]
    reasons: Mapping[str, str]
    complete: frozenset[str]
    manifests: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What decides about a version, from a manifest that may be of another release or damaged."""

    text: str
    content_hash: str | None
    anchor: str | None
    sequence: int


def read_line_versions(
    documents: Documents,
    line: str,
    policy: KeepConfig | None,
    planned_hashes: Iterable[str],
    planned_versions: Iterable[str],
    at: datetime,
) -> LineVersions:
    """List a line's versions and decide which stay.

    Args:
        documents: The documents of the store.
        line: The line.
        policy: How many stay; None: no plan says so, and all of them stay.
        planned_hashes: The hashes that plans name.
        planned_versions: The versions that plans name.
        at: The time.
    """
    files: dict[str, list[Entry]] = defaultdict(list)
    pinning: list[Entry] = []
    newest_moves: dict[str, Entry] = {}
    aliases: dict[str, Entry] = {}
    for entry in documents.store.list(f"models/{line}"):
        folder, _, path = entry.path.removeprefix(f"models/{line}/").partition("/")
        if folder == "versions":
            files[path.partition("/")[0]].append(entry)
        elif folder == "aliases":
            pinning.append(entry)
            aliases[path.removesuffix(".json")] = entry
        elif folder == "moving" and _age(entry, at) < timedelta(days=_MOVE_DAYS):
            pinning.append(entry)
        elif folder == "audit":
            # An alias's document that was lost is in its newest entry. The names of entries sort by generation.
            newest_moves[audit.alias_of_entry(path) or f"./{path}"] = entry

    texts = [documents.read(entry) for entry in (*pinning, *newest_moves.values())]
    texts += [entry.path for entry in pinning if "/moving/" in entry.path]
    manifests = {
        name: _parse(documents.read(entry))
        for name, entries in files.items()
        for entry in entries
        if entry.path == f"models/{line}/versions/{name}/manifest.json"
    }
    note = _lost_aliases(documents, line, aliases, newest_moves) if manifests else ""
    if note:
        policy = None
    elif policy is None and files:
        note = f"{line}: no plan in the store says how many versions stay; all do"
    reasons = dict(_reasons(manifests, policy, texts, set(planned_hashes), set(planned_versions), at))
    _add_anchors(reasons, manifests)
    return LineVersions(
        files=dict(files),
        reasons=reasons,
        complete=frozenset(manifests),
        manifests=tuple(manifests[name].text for name in reasons),
        notes=(note,) if note else (),
    )


def _reasons(
    manifests: Mapping[str, _Manifest],
    policy: KeepConfig | None,
    texts: list[str],
    hashes: set[str],
    planned: set[str],
    at: datetime,
) -> Iterator[tuple[str, str]]:
    """Yield each version that stays without being an anchor, and why."""
    named, pinned_hashes = stamped_in(*texts), hashes_in(*texts) | hashes
    # As releases of this code order versions: by the sequence that they state, then by their time.
    ordered = sorted(manifests, key=lambda name: (manifests[name].sequence, name), reverse=True)
    for position, name in enumerate(ordered):
        if policy is None:
            yield name, "nothing says how many versions stay, or which of them an alias names"
        elif name in named:
            yield name, "an alias names it, or a rollback needs it"
        elif name in planned:
            yield name, "a plan that counts names it"
        elif manifests[name].content_hash is None:
            yield name, "its manifest cannot be read"
        elif manifests[name].content_hash in pinned_hashes:
            yield name, "its content is rejected, or named by a plan"
        elif position < policy.versions:
            yield name, f"one of the newest {policy.versions}"
        elif at - time_of(name) < timedelta(days=policy.days):
            yield name, f"younger than {policy.days} days"


def _lost_aliases(
    documents: Documents, line: str, aliases: Mapping[str, Entry], newest_moves: Mapping[str, Entry]
) -> str:
    """Return a sentence about aliases that are lost or damaged, so that nobody knows what they name; else nothing."""
    names = sorted(filter(is_alias_name, aliases.keys() | newest_moves.keys()))
    if not names:
        return f"{line}: no alias names a version, and no audit entry says that one did; all versions stay"
    lost = [name for name in names if name not in aliases or not _names_version(documents.read(aliases[name]))]
    if not lost:
        return ""
    command = audit.repair_command(documents.store, line)
    return f"{line}: {', '.join(lost)}: lost or damaged; all versions stay until it is mended: {command}"


def _names_version(text: str) -> bool:
    """Return whether a document says which version an alias names."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and isinstance(document.get("version"), str)


def _add_anchors(reasons: dict[str, str], manifests: Mapping[str, _Manifest]) -> None:
    """Let the anchor of each version that stays, stay too: production is measured against it."""
    names = list(reasons)
    while names:
        anchor = manifests[names.pop()].anchor
        if anchor is not None and anchor in manifests and anchor not in reasons:
            reasons[anchor] = "the anchor of a version that stays"
            names.append(anchor)


def _parse(text: str) -> _Manifest:
    """Read a manifest leniently: what is not understood stays."""
    try:
        fields: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        fields = {}
    content, anchor, sequence = fields.get("content_hash"), fields.get("anchor"), fields.get("sequence")
    return _Manifest(
        text=text,
        content_hash=content if isinstance(content, str) else None,
        anchor=anchor if isinstance(anchor, str) else None,
        sequence=sequence if isinstance(sequence, int) else 0,
    )


def _age(entry: Entry, at: datetime) -> timedelta:
    return timedelta(seconds=min(max(at.timestamp() - entry.modified_at, 0.0), 1e9))
