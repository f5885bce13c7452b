"""Pull a published version to a folder: exactly the bytes that were published, or nothing.

The alias names a manifest by its hash, and the manifest names every file by its hash. All of them are checked before
the version becomes current (`pulled_folder.py`). A generation below that of an earlier pull is refused: the generation
of an alias only grows, so a lower one comes from an old copy of the store. A signature by another key than that of an
earlier pull is refused too, and so is another manifest of a version that was pulled before.

Command: `qlora-retrain pull LINE@ALIAS DEST --root URI`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_retrain.core import aliases, hashing, safety
from qlora_retrain.core.errors import Cause, IntegrityError, Problem, TryAgain, UsageError
from qlora_retrain.storage import (
    artifact,
    audit,
    plain_files,
    published_lines,
    pull_checks,
    range_download,
    registry,
    version_parts,
)
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.atomic_files import disk_errors
from qlora_retrain.storage.pull_checks import PullOptions
from qlora_retrain.storage.pulled_folder import MANIFEST, RECORD, PulledFolder
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import NotFound, Store, root_option

_NUM_READERS = 8


def split(reference: str) -> tuple[str, str]:
    """Return the line, and the alias or the version, of `LINE@ALIAS` or `LINE@VERSION`.

    Raises:
        UsageError: If it is neither.
    """
    line, at, name = reference.partition("@")
    if not at or not line or not name:
        raise UsageError(f"{reference}: expected LINE@ALIAS or LINE@VERSION, e.g. support-intents@production")
    published_lines.refuse_other_name(line)
    if not aliases.is_alias_name(name) and not pull_checks.is_version_name(name):
        raise UsageError(f"{reference}: {name!r} can be the name of neither an alias nor a version")
    return line, name


def resolve(store: Store, reference: str) -> tuple[Release, dict[str, Any]]:
    """Return the version that `LINE@ALIAS` or `LINE@VERSION` names, and the record for the next pull to compare with.

    Raises:
        UsageError: If the reference names nothing.
        IntegrityError: If the manifest is not the one that the alias promised.
    """
    line, name = split(reference)
    # A version's name is none of an alias, so nobody can put an alias in its place.
    if not aliases.is_alias_name(name):
        release = registry.read_release(store, line, name)
        record = {"line": line, "alias": None, "version": name, "generation": 0, "manifest_sha256": release.sha256}
        return release, record | {"signer": pull_checks.fingerprint_of(release)}

    alias = registry.read_alias(store, line, name)[0]
    if alias is None:
        raise UsageError(
            f"{store.uri}: line {line} has no alias {name}; nothing was published or promoted to it; to see what the "
            f"line has, run: qlora-retrain models list {line} {root_option(store)}"
        )
    if not pull_checks.is_version_name(alias.version):
        raise IntegrityError(
            f"{reference}: names {alias.version!r}, which is no version's name; somebody else wrote it"
        )
    try:
        release = registry.read_release(store, line, alias.version, sha256=alias.manifest_sha256)
    except IntegrityError as error:
        command = audit.repair_command(store, line)
        raise IntegrityError(f"{error}; to lead the alias to a version that is whole, run: {command}") from error
    # Whoever signs versions signs aliases too.
    if release.signer and not alias.signer:
        raise IntegrityError(
            f"{reference}: is not signed, and {alias.version}, which it names, is: somebody else moved it"
        )
    return release, {
        "line": line,
        "alias": name,
        "version": alias.version,
        "generation": alias.generation,
        "manifest_sha256": alias.manifest_sha256,
        # The alias names the manifest by its hash, so its signature is one for the version, too.
        "signer": pull_checks.fingerprint_of(alias),
    }


def pull(
    store: Store,
    reference: str,
    destination: Path,
    *,
    min_generation: int = 0,
    verify_key: str | None = None,
    sha256: str | None = None,
    parts: Sequence[str] = (),
) -> Release:
    """Put a verified version at `destination`; this replaces only what an earlier pull put there.

    Args:
        store: The store.
        reference: `LINE@ALIAS` or `LINE@VERSION`.
        destination: A new or empty folder, or that of an earlier pull; a link to one, or a mount point.
        min_generation: The lowest generation of the alias that is accepted. A new folder remembers no earlier pull, so
            only this shows there that a store is an old copy.
        verify_key: The fingerprint of the publisher's key. None: the key that an earlier pull recorded; a first pull
            records the one that it finds.
        sha256: The hash of the version's manifest that is accepted, whatever an earlier pull recorded; None: any.
        parts: `adapter`, `model` or `exports/NAME`, several allowed; empty: the whole version.

    Raises:
        UsageError: If the reference or a part names nothing, or another line or what no pull made is at `destination`.
        IntegrityError: If a byte differs from what was published, a file is none that a version may have, the alias
            went back in time, or another key than the expected one signed.
        TryAgain: If the store is busy, the disk is full, or somebody removes the destination meanwhile. The next pull
            goes on where this one stopped.
    """
    options = PullOptions(min_generation=min_generation, verify_key=verify_key, sha256=sha256)
    folder = PulledFolder(destination)
    # Before the destination is touched.
    previous = folder.record()
    planned = _plan(store, reference, options, previous, parts, folder.path)
    with disk_errors(folder.path), folder.locked():
        # Another pull may have ended meanwhile, of a later generation.
        if (record := folder.record()) != previous:
            planned = _plan(store, reference, options, record, parts, folder.path)
        try:
            _install(store, planned, folder)
        except FileNotFoundError as error:
            raise TryAgain(
                f"{folder.path}: somebody removed {error.filename} while this pulled; run the same command again"
            ) from error
    return planned.release


def recorded_signer(destination: Path) -> str | None:
    """Return the fingerprint of the key that signed what a folder holds; None where nothing was signed."""
    signer: str | None = json.loads((PulledFolder(destination).path / RECORD).read_text())["signer"]
    return signer


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a pull will bring.

    Attributes:
        release: The version.
        files: Those of its files that were asked for.
        record: The record of this pull.
    """

    release: Release
    files: tuple[File, ...]
    record: dict[str, Any] = field(repr=False)

    @property
    def label(self) -> str:
        """A name for the version with these files, so that an interrupted pull of the same is recognised."""
        content = [self.release.sha256, *sorted(file.path for file in self.files)]
        return f"{self.release.version}-{hashing.sha256_json(content)[:12]}"


def _plan(
    store: Store,
    reference: str,
    options: PullOptions,
    previous: dict[str, Any],
    parts: Sequence[str],
    destination: Path,
) -> _Planned:
    """Decide what will be pulled, and refuse what may not be."""
    release, record = resolve(store, reference)
    pull_checks.check(reference, release, record, previous, options, destination)
    label = f"{reference}: {release.version}"
    safety.refuse_foreign((file.path for file in release.files), label)
    version_parts.refuse_other_content(release, label)
    record = pull_checks.remember(reference, release, record, previous) | {"parts": sorted(set(parts))}
    return _Planned(release, version_parts.select(release, parts), record)


def _install(store: Store, planned: _Planned, folder: PulledFolder) -> None:
    """Make the version the current one; the folder is locked."""
    folder.adopt_flat_layout()
    folder.refuse_obstacles({file.path.partition("/")[0] for file in planned.files} | {MANIFEST})
    current = folder.current()
    if current is not None and _fault(current, planned) is None:
        folder.write_record(current, planned.record)
    else:
        folder.make_current(_assemble(store, planned, folder))
    folder.tidy()


def _assemble(store: Store, planned: _Planned, folder: PulledFolder) -> Path:
    """Return a whole and verified version in a folder beside the current one."""
    release, version = planned.release, None
    source = registry.version_folder(release.line, release.version)
    try:
        # Before anything is downloaded.
        if fault := artifact.size_fault(store, source, planned.files):
            raise IntegrityError(f"{store.uri}/{source}/{fault}; nothing was written to {folder.path}")
        version = folder.new_version(planned.label, planned.files)
        range_download.download(store, source, planned.files, version)
        if foreign := plain_files.first_foreign(version, {RECORD, *(file.path for file in planned.files)}):
            raise IntegrityError(f"{version}/{foreign}; somebody else put it there: pull again")
        safety.refuse_unsafe(version, f"{release.line} {release.version}")
        # Last, so that a folder with a manifest has all of its files.
        folder.write_record(version, planned.record)
        (version / MANIFEST).write_bytes(_manifest(store, source, release))
    except Problem as problem:
        # What was interrupted is of use to the next pull; bytes that differ are not.
        folder.discard(version if isinstance(problem, IntegrityError) else None)
        if isinstance(problem, IntegrityError) and MANIFEST not in store.children(source):
            raise TryAgain(
                f"{store.uri}/{source}: was removed while this pulled it, as a collection of garbage does; run the "
                "same command again",
                cause=Cause.INPUT_MISSING,
            ) from problem
        raise
    return version


def _manifest(store: Store, source: str, release: Release) -> bytes:
    """Return the bytes of the version's manifest."""
    try:
        data = store.read(f"{source}/{MANIFEST}").data
    except NotFound:
        data = b""
    if hashing.sha256_bytes(data) != release.sha256:
        raise IntegrityError(f"{store.uri}/{source}/{MANIFEST}: was changed while this pulled it; pull again")
    return data


def _fault(folder: Path, planned: _Planned) -> str | None:
    """Return the first fault of a version's folder, of which every byte is read, or None."""
    expected = {MANIFEST: planned.release.sha256, **{file.path: file.sha256 for file in planned.files}}
    if foreign := plain_files.first_foreign(folder, {RECORD, *expected}):
        return foreign

    def fault(name: str) -> str | None:
        path = folder / name
        return None if path.is_file() and hashing.sha256_file(path) == expected[name] else name

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return next((name for name in pool.map(fault, expected) if name), None)
