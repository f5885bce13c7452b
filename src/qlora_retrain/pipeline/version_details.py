"""What a person asks of one version: who published it, when and why, by which run, and what was decided on it."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_retrain.pipeline import version_summary
from qlora_retrain.pipeline.version_summary import VersionSummary
from qlora_retrain.storage import audit, rejections
from qlora_retrain.storage.registry import Alias, Rejection, Release
from qlora_retrain.storage.store import Store


@dataclass(frozen=True, slots=True)
class VersionDetails:
    """A version with its moves.

    Attributes:
        summary: Its manifest and verdicts.
        moves: (alias, state) of each move to it, the oldest first: who, when and why. The first is its publication.
        named_by: The aliases that name it now.
        rejections: (alias, rejection) that holds for it, of its content or its recipe.
        faults: A sentence for each alias that cannot be read, so that nobody knows whether it names the version.
    """

    summary: VersionSummary
    moves: tuple[tuple[str, Alias], ...]
    named_by: tuple[str, ...]
    rejections: tuple[tuple[str, Rejection], ...]
    faults: tuple[str, ...] = ()


def read(store: Store, release: Release) -> VersionDetails:
    """Read who moved an alias to a version, and what holds for it now."""
    states, _ = audit.history(store, release.line)
    moves = tuple((name, state) for name, state in states if state.version == release.version)
    current, faults = version_summary.read_aliases(store, release.line)
    by_alias = ((name, rejections.find(store, release.line, name, state, release)) for name, state in current.items())
    return VersionDetails(
        summary=version_summary.summarize(store, release),
        moves=tuple(move for move in moves if move[1].action not in ("reject", "unreject")),
        named_by=tuple(name for name, state in current.items() if state.version == release.version),
        rejections=tuple((name, rejection) for name, rejection in by_alias if rejection),
        faults=tuple(faults),
    )
