"""Which versions of a line stay, and why.

All stay while an alias is lost or damaged. Otherwise those stay whatever their age that an alias names, named in its
last moves (a rollback goes there) or rejected, that a plan that counts names, that somebody is moving an alias to, and
the anchor of each that stays; so do the files of one whose manifest is lost, since a backup may have it. Of the others
the newest `publish.keep.versions` stay, and those younger than `publish.keep.days`. Among the newest, a version counts
that the line's publisher signed: no other folder takes the place of one.
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
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.pipeline.stored_names import Documents, hashes_in, stamped_in, time_of
from qlora_retrain.storage import audit, keys, signatures
from qlora_retrain.storage.registry_documents import Alias, Release
from qlora_retrain.storage.store import Entry, Store

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
    is_genuine: bool


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
    moving: list[str] = []
    moves: dict[str, list[Entry]] = defaultdict(list)
    aliases: dict[str, Entry] = {}
    for entry in documents.store.list(f"models/{line}"):
        folder, _, path = entry.path.removeprefix(f"models/{line}/").partition("/")
        if folder == "versions":
            files[path.partition("/")[0]].append(entry)
        elif folder == "aliases":
            aliases[path.removesuffix(".json")] = entry
        elif folder == "moving" and _age(entry, at) < timedelta(days=_MOVE_DAYS):
            moving.append(entry.path)
        elif folder == "audit":
            # The names of entries sort by generation.
            moves[audit.alias_of_entry(path) or f"./{path}"].append(entry)

    # An announced move has the version in its name; what is in it, the role `gc` may not read.
    texts = [documents.read(entry) for entry in aliases.values()] + moving
    # An alias's document that was lost, or replaced by an old one, is in its newest entry.
    for entries in moves.values():
        texts += _newest_state(documents, entries)
    manifests = {
        name: _parse(documents.store, line, name, documents.read(entry))
        for name, entries in files.items()
        for entry in entries
        if entry.path == f"models/{line}/versions/{name}/manifest.json"
    }
    note = _lost_aliases(documents, line, aliases, moves) if manifests else ""
    if note:
        policy = None
    elif policy is None and files:
        note = f"{line}: no plan in the store says how many versions stay; all do"
    named, planned = stamped_in(*texts), set(planned_versions)
    reasons = dict(_reasons(manifests, policy, named, planned, hashes_in(*texts) | set(planned_hashes), at))
    _add_anchors(reasons, manifests)
    notes = [note] if note else []
    for name in sorted((named | planned) & files.keys() - manifests.keys()):
        reasons[name] = "an alias or a plan names it, and its manifest is lost"
        notes.append(f"{line}: {name}: {reasons[name]}; its files stay, so that a backup of the manifest mends it")
    return LineVersions(
        files=dict(files),
        reasons=reasons,
        complete=frozenset(manifests),
        manifests=tuple(manifests[name].text for name in reasons if name in manifests),
        notes=tuple(notes),
    )


def _reasons(
    manifests: Mapping[str, _Manifest],
    policy: KeepConfig | None,
    named: set[str],
    planned: set[str],
    pinned_hashes: set[str],
    at: datetime,
) -> Iterator[tuple[str, str]]:
    """Yield each version that stays without being an anchor, and why."""
    # As releases of this code order versions: by the sequence that they state, then by their time.
    num_newer = 0
    for name in sorted(manifests, key=lambda name: (manifests[name].sequence, name), reverse=True):
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
        elif num_newer < policy.versions:
            yield name, f"one of the newest {policy.versions}"
        elif at - time_of(name) < timedelta(days=policy.days):
            yield name, f"younger than {policy.days} days"
        num_newer += manifests[name].is_genuine


def _newest_state(documents: Documents, entries: list[Entry]) -> Iterator[str]:
    """Yield the entries of an alias from the newest one back to one that says what it named, whoever wrote others."""
    for entry in reversed(entries):
        yield documents.read(entry)
        if _is_state(documents, entry):
            return


def _lost_aliases(
    documents: Documents, line: str, aliases: Mapping[str, Entry], moves: Mapping[str, list[Entry]]
) -> str:
    """Return a sentence about aliases that are lost or damaged, so that nobody knows what they name; else nothing."""
    names = sorted(filter(is_alias_name, aliases.keys() | moves.keys()))
    if not names:
        return f"{line}: no alias names a version, and no audit entry says that one did; all versions stay"
    lost = [name for name in names if name not in aliases or not _is_state(documents, aliases[name])]
    if not lost:
        return ""
    command = audit.repair_command(documents.store, line)
    return f"{line}: {', '.join(lost)}: lost or damaged; all versions stay until it is mended: {command}"


def _is_state(documents: Documents, entry: Entry) -> bool:
    """Return whether a document says which version an alias names, in the words of the line's publisher."""
    path, role = entry.path, keys.publish_role(entry.path.split("/")[1])
    try:
        signatures.parse(
            documents.store, path, documents.read(entry).encode(), Alias, role, signed_path=signatures.signed_path(path)
        )
    except (IntegrityError, ValueError):
        return False
    return True


def _add_anchors(reasons: dict[str, str], manifests: Mapping[str, _Manifest]) -> None:
    """Let the anchor of each version that stays, stay too: production is measured against it."""
    names = list(reasons)
    while names:
        anchor = manifests[names.pop()].anchor
        if anchor is not None and anchor in manifests and anchor not in reasons:
            reasons[anchor] = "the anchor of a version that stays"
            names.append(anchor)


def _parse(store: Store, line: str, name: str, text: str) -> _Manifest:
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
        is_genuine=_is_genuine(store, line, name, text),
    )


def _is_genuine(store: Store, line: str, name: str, text: str) -> bool:
    """Return whether a manifest is that of this version, signed by the line's publisher where the store has keys."""
    path = f"models/{line}/versions/{name}/manifest.json"
    try:
        release = signatures.parse(store, path, text.encode(), Release, keys.publish_role(line))
    except (IntegrityError, ValueError):
        return False
    return (release.line, release.version) == (line, name)


def _age(entry: Entry, at: datetime) -> timedelta:
    return timedelta(seconds=min(max(at.timestamp() - entry.modified_at, 0.0), 1e9))
