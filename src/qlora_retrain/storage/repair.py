"""Mend what is stuck in a line's registry, where there is one right state; say what cannot be mended, and why.

- an alias whose file is lost, damaged or an old copy: the newest entry of the audit trail is its state
- a move that has no audit entry, since its writer died
- a version with missing or changed files that an alias names: copied again from its run's artifacts
- an alias whose version is lost for good: it goes back to the newest earlier version that verifies
- an audit trail that was changed: said, and never mended
- `latest` on a version of a clock that ran ahead, published before versions were ordered by their `sequence`

Command: `qlora-retrain models repair LINE [VERSION ...]`
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from qlora_retrain.core import aliases
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import audit, keys, probes, published_lines, registry, signatures, version_repair
from qlora_retrain.storage.registry import LATEST, Alias, Release
from qlora_retrain.storage.store import Conflict, NotFound, Store, root_option

# Clocks differ by seconds; one that is a day ahead is wrong.
_CLOCK_TOLERANCE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of a line's registry.

    Attributes:
        subject: The alias or the version.
        fault: What is wrong with it.
        remedy: What was done, or would be; where it cannot be mended, what a person can do.
        is_mended: Whether that puts it right.
    """

    subject: str
    fault: str
    remedy: str
    is_mended: bool


def repair(
    store: Store, line: str, versions: Sequence[str] = (), *, reason: str, is_dry_run: bool = False
) -> list[Finding]:
    """Mend a line's aliases, the versions that they name, and further versions.

    Args:
        store: The store.
        line: The line.
        versions: Versions that are to be mended too.
        reason: A sentence for the audit trail.
        is_dry_run: Only say what would be done.

    Returns:
        Every fault, with what became of it; none of a line that is whole.

    Raises:
        UsageError: If the line has no aliases and no versions, there is no such version, or this user may not read a
            file.
    """
    if not reason.strip():
        raise UsageError(
            f"line {line}: expected a reason for the audit trail, found an empty text; say it with --reason"
        )
    names = sorted(_alias_names(store, line))
    if not names and not list(store.children(f"models/{line}/versions")):
        raise published_lines.no_such_line(store, line)
    if not is_dry_run:
        probes.ensure_conditional_writes(store)
    mender = _Mender(store, line, reason, is_dry_run)
    findings: list[Finding] = []
    for name in names:
        findings += mender.mend_alias(name)
    for version in versions:
        findings += mender.mend_version(version)
    return [*findings, *(Finding("audit trail", fault, _remedy(fault), False) for fault in mender.trail_faults())]


class _Mender:
    """Mends one line."""

    def __init__(self, store: Store, line: str, reason: str, is_dry_run: bool) -> None:
        self._store, self._line, self._reason, self._is_dry_run = store, line, reason, is_dry_run
        # What a dry run would write: aliases' documents, and entries as (alias, generation).
        self._aliases: set[str] = set()
        self._entries: set[tuple[str, int]] = set()

    def trail_faults(self) -> list[str]:
        """Return the faults that the audit trail has after what was mended, or would be."""
        faults = audit.history(self._store, self._line, assumed=self._entries)[1]
        places = tuple(f"{self._store.uri}/{audit.alias_path(self._line, name)}:" for name in self._aliases)
        return [fault for fault in faults if not fault.startswith(places)]

    def mend_alias(self, name: str) -> Iterator[Finding]:
        """Yield the faults of an alias and of the version that it names."""
        state, fault = self._read(name)
        newest = next(audit.entries(self._store, self._line, name), None)
        if newest is not None and (state is None or newest.generation > state.generation):
            fault = fault or f"is of generation {state.generation if state else 0}, an old copy"
            yield self._put_back(name, newest, fault)
            state = newest
        elif state is None:
            yield Finding(name, fault, self._unknown_state(name), False)
            return
        # One that is there and not accepted is a fault of the trail, and cannot be written again.
        elif (newest is None or newest.generation < state.generation) and not self._has_entry(name, state):
            remedy = f"wrote the audit entry of generation {state.generation}"
            self._entries.add((name, state.generation))
            if not self._is_dry_run:
                audit.write_entry(self._store, self._line, name, state)
            yield Finding(name, "its last move has no audit entry", remedy, True)

        release = yield from self._named_version(name, state)
        if name == LATEST and release is not None and _is_of_the_future(release):
            yield self._move(name, f"names {release.version}, of a clock that ran ahead", self._newest(release.version))

    def mend_version(self, version: str, *, sha256: str | None = None) -> Iterator[Finding]:
        """Yield the faults of a version, each mended from the artifacts of its run or with the reason why not."""
        try:
            release = version_repair.read_remembered(self._store, self._line, version, sha256=sha256)
            for path in version_repair.verify_or_repair(self._store, release, is_dry_run=self._is_dry_run):
                yield Finding(version, f"{path} was missing or changed", "copied it again from its artifact", True)
        except IntegrityError as error:
            yield Finding(version, str(error), "no artifact has it any more", False)

    def _read(self, name: str) -> tuple[Alias | None, str]:
        """Return the state in an alias's file, whatever the audit trail says; and what is wrong where there is none."""
        try:
            return audit.read_alias(self._store, self._line, name)[0], ""
        except NotFound:
            return None, "its file is lost"
        except IntegrityError as error:
            return None, f"its file is damaged: {error}"

    def _unknown_state(self, name: str) -> str:
        """Return what a person can do about an alias of which no accepted document has a state."""
        path = audit.alias_path(self._line, name)
        sets_it = "the next run that publishes sets it" if name == LATEST else "promote a version, which sets it"
        if not self._has(path):
            return f"no audit entry has a state of it; {sets_it}"
        # After a publisher's key was stolen, every document that it signed has to be looked at.
        accept = f"qlora-retrain keys accept {path} {root_option(self._store)}"
        hint = (
            f"if the file is right all the same, run: {accept}; otherwise "
            if keys.find_keyring(self._store.uri)
            else ""
        )
        return f"no audit entry that is accepted has a state of it; {hint}remove the file: then {sets_it}"

    def _has_entry(self, name: str, state: Alias) -> bool:
        """Return whether the entry of a state is there, whoever signed it."""
        return self._has(audit.entry_path(self._line, name, state))

    def _has(self, path: str) -> bool:
        try:
            self._store.read_start(path, 1)
        except NotFound:
            return False
        return True

    def _put_back(self, name: str, newest: Alias, fault: str) -> Finding:
        """Put the newest audit entry in the place of an alias's file: it is the same document."""
        remedy = f"put generation {newest.generation} with {newest.version} back, from the audit trail"
        if self._is_dry_run:
            self._aliases.add(name)
            return Finding(name, fault, remedy, True)
        path = audit.alias_path(self._line, name)
        signatures.refuse_unverified(self._store, path, newest.signature)
        try:
            tag = self._store.read(path).tag
        except NotFound:
            tag = None
        data = self._store.read(audit.entry_path(self._line, name, newest)).data
        try:
            self._store.swap(path, data, tag)
        except Conflict:
            return Finding(name, fault, "somebody else has just written it; look again", False)
        return Finding(name, fault, remedy, True)

    def _named_version(self, name: str, state: Alias) -> Generator[Finding, None, Release | None]:
        """Yield the faults of the version that an alias names; return it where it is whole in the end."""
        findings = list(self.mend_version(state.version, sha256=state.manifest_sha256))
        if all(finding.is_mended for finding in findings):
            yield from findings
            return registry.read_release(self._store, self._line, state.version)
        fault = f"names {state.version}, which is lost: {findings[-1].fault}"
        yield self._move(name, fault, self._newest(state.version) if name == LATEST else self._earlier(state))
        return None

    def _move(self, name: str, fault: str, target: Release | None) -> Finding:
        if target is None:
            return Finding(name, fault, "the line has no other version that verifies; run the line again", False)
        if not self._is_dry_run:
            registry.move_alias(
                self._store, self._line, name, target, reason=f"{self._reason} (it {fault})", action="repair",
                is_verified=True,
            )  # fmt: skip
        return Finding(name, fault, f"moved it to {target.version}", True)

    def _newest(self, lost: str) -> Release | None:
        """Return the newest other version that verifies, of those whose time is not in the future."""
        releases: list[Release] = []
        for name in self._store.children(f"models/{self._line}/versions"):
            with contextlib.suppress(IntegrityError, UsageError):
                releases.append(registry.read_release(self._store, self._line, name))
        candidates = sorted((r for r in releases if not _is_of_the_future(r)), key=lambda r: r.order, reverse=True)
        # Every byte of a version is read, so those after the first that is whole are left alone.
        whole = (self._whole(release.version) for release in candidates if release.version != lost)
        return next((release for release in whole if release), None)

    def _earlier(self, state: Alias) -> Release | None:
        """Return the newest version that the alias named before, was not rejected, and verifies."""
        earlier = registry.earlier_move(state)
        while earlier is not None:
            if release := self._whole(earlier.version, earlier.manifest_sha256):
                return release
            earlier = registry.earlier_move(state, before=earlier)
        return None

    def _whole(self, version: str, sha256: str | None = None) -> Release | None:
        release = None
        with contextlib.suppress(IntegrityError, UsageError):
            release = version_repair.read_remembered(self._store, self._line, version, sha256=sha256)
        if release is None:
            return None
        # Not what this user may not read, which is whole perhaps.
        with contextlib.suppress(IntegrityError):
            version_repair.verify_or_repair(self._store, release, is_dry_run=self._is_dry_run)
            return release
        return None


def _remedy(fault: str) -> str:
    """Return what a person can do about a fault of the audit trail."""
    if audit.STRANGE_NAME in fault:
        return "remove that file, and find out who can write there"
    return (
        "nothing else in the store has the entry: put it back from a backup or an earlier version of the object, and "
        "find out who can write there; moves and pulls work without it"
    )


def _alias_names(store: Store, line: str) -> set[str]:
    """Return the aliases that have a file, or a state in the audit trail."""
    names = {name.removesuffix(".json") for name in store.children(f"models/{line}/aliases")}
    return {name for name in names | audit.alias_names(store, line) if aliases.is_alias_name(name)}


def _is_of_the_future(release: Release) -> bool:
    """Return whether only a wrong clock makes a version the newest: a `sequence` orders it whatever its time."""
    if release.sequence is not None:
        return False
    try:
        at = datetime.strptime(release.version.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return False
    return at > datetime.now(UTC) + _CLOCK_TOLERANCE
