"""A store's published models from Python: the verbs of `qlora-retrain models`, under the same names.

    from qlora_retrain.registry import Registry

    models = Registry("s3://models/qlora")
    release = models.pull("support-intents@production", "./model")

A version is named by `LINE@ALIAS` or `LINE@VERSION`. Errors are those of `qlora_retrain.core.errors`, with the exit
code that the command would end with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qlora_retrain.core import aliases
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import collect, version_details, version_diff, version_summary
from qlora_retrain.pipeline.collect import Collection
from qlora_retrain.pipeline.version_details import VersionDetails
from qlora_retrain.pipeline.version_diff import VersionDiff
from qlora_retrain.pipeline.version_summary import LineSummary
from qlora_retrain.storage import (
    audit,
    export,
    moves,
    open_store,
    published_lines,
    pull,
    registry,
    reject,
    repair,
    version_repair,
)
from qlora_retrain.storage.keys import read_fingerprint
from qlora_retrain.storage.moves import Request
from qlora_retrain.storage.registry import PRODUCTION, Alias, Release
from qlora_retrain.storage.repair import Finding

__all__ = ["Alias", "Collection", "Finding", "LineSummary", "Registry", "Release", "VersionDetails", "VersionDiff"]


class Registry:
    """The published models of a store.

    Args:
        root: The store: `file:///folder`, `s3://bucket/prefix` or the path of a folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.store = open_store(os.fspath(root))

    def __repr__(self) -> str:
        return f"Registry({self.store.uri!r})"

    def list(self, line: str) -> LineSummary:
        """Return a line's aliases and its newest versions, with their verdicts.

        Raises:
            UsageError: If the line has published nothing.
        """
        published_lines.refuse_other_name(line)
        summary = version_summary.read_line(self.store, line)
        if not summary.num_versions and not summary.aliases and not summary.faults:
            raise published_lines.no_such_line(self.store, line)
        return summary

    def show(self, reference: str) -> VersionDetails:
        """Return who published a version, when, why and from which run; its verdicts; and what holds for it now."""
        return version_details.read(self.store, pull.resolve(self.store, reference)[0])

    def diff(self, first: str, second: str) -> VersionDiff:
        """Return what differs between two versions: data, recipe, base, code, and metrics with their intervals."""
        return version_diff.compare(self.store, *(pull.resolve(self.store, name)[0] for name in (first, second)))

    def history(self, line: str) -> Sequence[tuple[str, Alias]]:
        """Return (alias, state) of every move of a line, the oldest first.

        Raises:
            UsageError: If the line has published nothing.
            IntegrityError: If the audit trail was changed.
        """
        published_lines.refuse_other_name(line)
        states, faults = audit.history(self.store, line)
        if not states and not faults:
            raise published_lines.no_such_line(self.store, line)
        if faults:
            raise IntegrityError("\n".join(["the audit trail was changed:", *faults]))
        return states

    def verify(self, reference: str) -> Release:
        """Read every byte of a version and compare it with its manifest, and that with the audit trail.

        Raises:
            IntegrityError: If one differs.
        """
        line, version = pull.split(reference)
        # A version whose manifest is lost is one that differs, and none that never was.
        if aliases.is_alias_name(version):
            version = pull.resolve(self.store, reference)[0].version
        release = version_repair.read_remembered(self.store, line, version)
        registry.verify_version(self.store, release)
        return release

    def versions(self, line: str) -> Sequence[str]:
        """Return the names of a line's versions, those of attempts that published nothing left out.

        Raises:
            UsageError: If the line has published nothing.
        """
        published_lines.refuse_other_name(line)
        names = set(self.store.children(f"models/{line}/versions"))
        # One whose manifest is lost counts where an alias has named it; one of which nothing is left, while one does.
        states = audit.history(self.store, line)[0]
        remembered = {state.version for _, state in states}
        named = {name: state.version for name, state in states}
        named |= {name: state.version for name, state in version_summary.read_aliases(self.store, line)[0].items()}
        versions = sorted(
            {n for n in names if n in remembered or version_summary.has_manifest(self.store, line, n)}
            | set(named.values())
        )
        if not versions:
            raise published_lines.no_such_line(self.store, line)
        return versions

    def pull(self, reference: str, destination: Path | str, *, parts: Sequence[str] = (), sha256: str | None = None,
             min_generation: int = 0, verify_key: str | None = None) -> Release:  # fmt: skip
        """Put a verified version, or some parts of it, at a folder.

        Args:
            reference: `LINE@ALIAS` or `LINE@VERSION`.
            destination: A new or empty folder, or that of an earlier pull.
            parts: `adapter`, `model` or `exports/NAME`, several allowed; empty: the whole version.
            sha256: The hash of the version's manifest that is accepted; None: any.
            min_generation: The lowest generation of the alias that is accepted.
            verify_key: The publisher's key: its fingerprint, or a file in PEM; None: that of an earlier pull.

        Returns:
            The version's manifest.
        """
        parts = [parts] if isinstance(parts, str) else parts
        fingerprint = None if verify_key is None else read_fingerprint(verify_key)
        return pull.pull(
            self.store, reference, _path(destination), parts=parts, sha256=sha256, min_generation=min_generation,
            verify_key=fingerprint,
        )  # fmt: skip

    def export(self, reference: str, name: str, destination: Path | str) -> Sequence[Path]:
        """Bring one export of a version, such as `gguf-q8_0`, to a file or a folder."""
        return export.export(self.store, reference, name, _path(destination))

    def promote(self, line: str, version: str, *, reason: str, alias: str = PRODUCTION, current: str | None = None,
                override: bool = False, request_id: str | None = None) -> Alias | None:  # fmt: skip
        """Point an alias at a version; return its new state, or None where it named that version already.

        Args:
            line: The line.
            version: The version, without the line.
            reason: A sentence for the audit trail.
            alias: The alias.
            current: The version that it named when this was decided (`none`: no version); None: any. Where it names
                another one by now, nothing is moved.
            override: Allow a version that was rejected.
            request_id: 12 to 64 hexadecimal digits; a request that is repeated with them moves once.
        """
        request = _request(line, alias, reason, current, request_id)
        return moves.promote(self.store, request, version, override=override)

    def rollback(self, line: str, *, reason: str, alias: str = PRODUCTION, current: str | None = None,
                 to: str | None = None, request_id: str | None = None) -> Alias:  # fmt: skip
        """Move an alias back and reject what it leaves; return the alias's state.

        Args:
            line: The line.
            reason: A sentence for the audit trail.
            alias: The alias.
            current: The version to leave; the same call again does nothing. None: whichever it names now.
            to: Refuse to go back to another version than this; None: whichever was before.
            request_id: 12 to 64 hexadecimal digits; a request that is repeated with them moves once.
        """
        return moves.rollback(self.store, _request(line, alias, reason, current, request_id), to)

    def reject(self, line: str, version: str, *, reason: str, alias: str = PRODUCTION) -> Alias | None:
        """Keep an alias from naming a version, its content and what its recipe makes; None where it is rejected."""
        return reject.reject(self.store, _request(line, alias, reason), version)

    def unreject(self, line: str, version: str, *, reason: str, alias: str = PRODUCTION) -> Alias | None:
        """Allow an alias to name a version again; None where nothing had rejected it."""
        return reject.unreject(self.store, _request(line, alias, reason), version)

    def repair(self, line: str, versions: Sequence[str] = (), *, reason: str = "repaired by hand",
               is_dry_run: bool = False) -> Sequence[Finding]:  # fmt: skip
        """Mend what is stuck in a line, and the files of `versions` too; return every fault with what became of it."""
        published_lines.refuse_other_name(line)
        versions = [versions] if isinstance(versions, str) else versions
        return repair.repair(self.store, line, versions, reason=reason, is_dry_run=is_dry_run)

    def gc(self, *, delete: bool = False, run_days: int = 180) -> Collection:
        """Return what the store does not need any more; remove it if `delete` is set.

        Logs and pages of runs go after `run_days`, 30 at least.
        """
        return collect.collect(self.store, is_dry_run=not delete, run_days=run_days)

    def probe(self) -> None:
        """Check that the store honours conditional writes, without which no alias moves safely.

        Raises:
            UsageError: If it does not, or the root is a folder that does not exist.
        """
        published_lines.refuse_missing_folder(self.store)
        self.store.probe()


def _path(destination: Path | str) -> Path:
    """Return the path; an empty text would mean the working directory."""
    if not str(destination):
        raise UsageError("expected a path, found an empty text; the working directory is .")
    return Path(destination)


def _request(line: str, alias: str, reason: str, current: str | None = None, request_id: str | None = None) -> Request:
    published_lines.refuse_other_name(line)
    return Request(line, alias, reason, current, request_id)
