"""What a person asks of published versions first: which aliases name them, what was decided, and by which numbers.

Reads a line's aliases and the manifests and verdicts of its newest versions. A version that cannot be read is shown
with the reason, and takes no other one down. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from qlora_retrain.core import aliases as alias_names
from qlora_retrain.core import json_depth
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import audit, open_store, registry, verified_files
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Alias, Release
from qlora_retrain.storage.store import NotFound, Store

EVALUATION, CERTIFICATE = "evaluation/evaluation.json", "evaluation/certificate.json"
# A page of more versions is read by nobody; the others are in the store.
MAX_VERSIONS = 50
# Of a document that is kept in memory; 256 of them are. An evaluation has 50 KB.
_MAX_CACHED_BYTES = 256 * 1024
# Requests to the store at once.
_NUM_READERS = 8
Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measurement:
    """A metric with the ends of its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True, slots=True)
class VersionSummary:
    """A published version with its two verdicts.

    Attributes:
        release: Its manifest.
        verdict: The decision on the challenger, and the sentence that says why.
        merged_verdict: The same of the form that ships.
        metric: The primary metric of its evaluation; empty where the evaluation names none.
        measured: The challenger's value of it.
        best_before: The value of the line's best version before, on the same rows.
    """

    release: Release
    verdict: tuple[str, str]
    merged_verdict: tuple[str, str]
    metric: str
    measured: Measurement | None
    best_before: Measurement | None


@dataclass(frozen=True, slots=True)
class LineSummary:
    """A line's aliases and newest versions.

    Attributes:
        line: The line.
        aliases: Alias by name.
        versions: The newest versions, unless it is brief, and those that aliases name; the newest first.
        num_versions: The number of all versions, of those without a manifest too.
        faults: A sentence for each alias or version that cannot be shown.
    """

    line: str
    aliases: dict[str, Alias]
    versions: tuple[VersionSummary, ...]
    num_versions: int
    faults: tuple[str, ...]

    def version(self, name: str | None) -> VersionSummary | None:
        """Return the version of that name, if it is among them."""
        return next((entry for entry in self.versions if entry.release.version == name), None)

    def alias_names(self, version: str) -> list[str]:
        """Return the aliases that name a version."""
        return sorted(name for name, state in self.aliases.items() if state.version == version)


def read_line(store: Store, line: str, *, is_brief: bool = False) -> LineSummary:
    """Read a line's aliases, the versions that they name, and its newest ones, which a brief summary does not have."""
    aliases, faults = read_aliases(store, line)
    names = sorted(store.children(f"models/{line}/versions"), reverse=True)
    newest_names = [] if is_brief else names[:MAX_VERSIONS]
    # What production names may be older, where many candidates after it were refused.
    chosen_names = {*newest_names, *(state.version for state in aliases.values())} & set(names)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        entries = list(pool.map(partial(_read_version, store, line), sorted(chosen_names, reverse=True)))
    summaries = (entry for entry in entries if isinstance(entry, VersionSummary))
    versions = tuple(sorted(summaries, key=lambda entry: entry.release.order, reverse=True))
    faults += [entry for entry in entries if isinstance(entry, str)]
    faults += _lost_versions(store, line, aliases)
    return LineSummary(line, aliases, versions, len(names), tuple(faults))


def read_lines(store: Store, lines: Iterable[str]) -> list[LineSummary]:
    """Read a brief summary of each line."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(partial(read_line, store, is_brief=True), lines))


def find_release(store: Store, line: str, version: str) -> Release | None:
    """Return a version's manifest, or None where there is no such version."""
    return registry.read_release(store, line, version) if has_manifest(store, line, version) else None


def has_manifest(store: Store, line: str, version: str) -> bool:
    """Return whether there is such a version; an attempt that published nothing left a folder without a manifest."""
    try:
        store.read_start(f"{registry.version_folder(line, version)}/manifest.json", 1)
    except NotFound:
        return False
    return True


def summarize(store: Store, release: Release) -> VersionSummary:
    """Read the two verdicts of a version."""
    evaluation, certificate = (read_document(store, release, path) for path in (EVALUATION, CERTIFICATE))
    metric = evaluation.get("metric")
    metric = metric if isinstance(metric, str) else ""
    # Where the champion is the best version, no contestant is called `anchor`.
    holder = next((name for name in ("anchor", "champion") if name in contestants(evaluation)), "")
    return VersionSummary(
        release=release,
        verdict=_verdict(evaluation),
        merged_verdict=_verdict(certificate),
        metric=metric,
        measured=measurement(contestants(evaluation).get("challenger"), metric),
        best_before=measurement(contestants(evaluation).get(holder), metric),
    )


def read_document(store: Store, release: Release, path: str) -> Document:
    """Return a JSON document of a version: an empty one where the version has none, or where it is no object.

    Raises:
        IntegrityError: If its bytes are not those that the manifest names, or are no JSON.
        UsageError: If it is too large.
    """
    file = verified_files.find_file(release.files, path)
    if file is None:
        return {}
    folder = registry.version_folder(release.line, release.version)
    read = _read_once if file.size_bytes <= _MAX_CACHED_BYTES else _read_file
    try:
        document = json_depth.loads(read(store.uri, folder, file.path, file.size_bytes, file.sha256))
    except ValueError as error:
        raise IntegrityError(f"{store.uri}/{folder}/{path}: not a document: {error}") from error
    return document if isinstance(document, dict) else {}


def contestants(evaluation: Document) -> Document:
    """Return the metrics of an evaluation's contestants on the evaluation rows."""
    values = evaluation.get("contestants")
    return values if isinstance(values, dict) else {}


def measurement(values: object, metric: str) -> Measurement | None:
    """Return a contestant's value of a metric; None where it has none, whatever else the document holds."""
    if not isinstance(values, dict):
        return None
    value, low, high = (_finite(values.get(name)) for name in (metric, f"{metric}_low", f"{metric}_high"))
    return None if value is None else Measurement(value, low, high)


def _lost_versions(store: Store, line: str, aliases: Mapping[str, Alias]) -> Iterator[str]:
    """Yield a sentence for each alias that names a version without a manifest, or what no version is called."""
    for name, state in sorted(aliases.items()):
        try:
            is_lost = not has_manifest(store, line, state.version)
        except UsageError as error:
            yield f"alias {name} names {state.version!r}: {error}"
            continue
        if is_lost:
            command = audit.repair_command(store, line)
            yield f"alias {name} names {state.version}, whose manifest is lost; to mend what can be mended: {command}"


def _read_version(store: Store, line: str, version: str) -> VersionSummary | str | None:
    """Return a version, a sentence that says why it cannot be shown, or None for an attempt that published nothing."""
    try:
        release = find_release(store, line, version)
        return None if release is None else summarize(store, release)
    except (IntegrityError, UsageError) as error:
        return f"version {version} cannot be shown: {error}"


def read_aliases(store: Store, line: str) -> tuple[dict[str, Alias], list[str]]:
    """Return a line's aliases by name, and a sentence for each that cannot be read or whose file is lost."""
    aliases: dict[str, Alias] = {}
    faults: list[str] = []
    files = {name.removesuffix(".json") for name in store.children(f"models/{line}/aliases") if name.endswith(".json")}
    for name in sorted(filter(alias_names.is_alias_name, files | audit.alias_names(store, line))):
        try:
            state, _ = registry.read_alias(store, line, name)
        except IntegrityError as error:
            faults.append(f"alias {name} cannot be shown: {error}")
        else:
            if state is not None:
                aliases[name] = state
    return aliases, faults


def _read_file(root: str, folder: str, path: str, size_bytes: int, sha256: str) -> bytes:
    file = File(path=path, size_bytes=size_bytes, sha256=sha256)
    return verified_files.read_verified(open_store(root), folder, file)


# A version's documents never change, so that pages of many versions read each of them once.
_read_once = lru_cache(maxsize=256)(_read_file)


def _verdict(document: Document) -> tuple[str, str]:
    decision, sentence = (document.get(name) for name in ("verdict", "sentence"))
    return str(decision or "not measured"), str(sentence or "")


def _finite(value: object) -> float | None:
    """Return a number of a document; None for anything else, NaN, and an integer that is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e18 < value < 1e18 else None
