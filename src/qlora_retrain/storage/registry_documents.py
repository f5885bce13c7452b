"""The documents of published models: a version's manifest, and an alias.

The field names are the JSON of every store in use, which older releases read and wrote too. Never rename one, and give
every new one a default. `tests/storage/test_older_stores.py` reads documents of an older release.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from qlora_retrain.core import graph
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.signatures import Signed

# What a change of an alias was: a move to a version, one back, a change of what is rejected, or the mending of a fault.
Action = Literal["promote", "rollback", "reject", "unreject", "repair"]


class Release(Signed):
    """A version's manifest: its files by hash, and what it was made of.

    Attributes:
        adapter_key: The key of the adapter.
        judgement: The hash of the rules, settings and data by which the version was judged.
        anchor: The line's best version, this one included, by the verdict on the merged form. Older manifests have
            none, which means the version itself.
        keys: The key of what each step of the run made, by the step's name.
        base: The pins of the base model's files; of an adapter alone also the base's id on the Hub, where it has one.
        sequence: One more than the generation of `latest` when the run was planned. It orders the versions of a line,
            whatever the clocks of planners say. Older manifests have none, and come first.
    """

    schema_version: Literal[1] = 1
    line: str
    version: str
    content_hash: str
    created_at: str
    files: tuple[File, ...]
    adapter_key: str
    judgement: str
    anchor: str | None = None
    keys: dict[str, str | None]
    base: dict[str, Any]
    numbers: dict[str, Any]
    provenance: dict[str, Any]
    sequence: int | None = Field(default=None, exclude_if=lambda value: value is None)
    # Of the bytes that it was read from.
    _sha256: str | None = PrivateAttr(default=None)

    @property
    def sha256(self) -> str:
        """The hash by which an alias names it: of the bytes that were read, whatever is in their place by now."""
        assert self._sha256 is not None, "the manifest was not read from a store"
        return self._sha256

    @property
    def is_adapter_alone(self) -> bool:
        """Whether the version has an adapter and no model, so that who uses it needs its base."""
        return any(file.path == graph.BASE_REFERENCE for file in self.files)

    @property
    def order(self) -> tuple[int, str]:
        """What sorts the versions of a line, the oldest first; the name decides among runs planned side by side."""
        return self.sequence or 0, self.version

    def parts(self, *names: str) -> tuple[File, ...]:
        """Return the files that have these names or are in folders of these names."""
        return tuple(f for f in self.files if f.path in names or f.path.partition("/")[0] in names)


class Move(BaseModel):
    """One earlier state of an alias; states of before have no `manifest_sha256` here, but in the audit trail."""

    model_config = ConfigDict(frozen=True)
    version: str
    generation: int
    at: str
    manifest_sha256: str | None = Field(default=None, exclude_if=lambda value: value is None)


class Rejection(BaseModel):
    """A version that an alias may not name again, and who said so.

    Attributes:
        version: The version.
        content_hash: The hash of its content; None where its manifest was lost.
        recipe: The key of its recipe, see `recipes.py`; None where it states none.
        reason: The reason, in the words of whoever rejected it.
        actor: Who rejected it; see `actor.py`.
        at: The time.
    """

    model_config = ConfigDict(frozen=True)
    version: str
    content_hash: str | None
    recipe: str | None = None
    reason: str
    actor: str
    at: str


class Alias(Signed):
    """The document of an alias: the version that it names, and its earlier states.

    Attributes:
        generation: The number of moves so far.
        moves: The newest earlier states, the last one at the end; a rollback goes back through them.
        rejected: The content hashes of versions that were rolled back or rejected by hand.
        rejections: The same with who and why; states of before have it in the audit trail alone, see `rejections.py`.
        action: What led to this state; states of before do not say it.
        request_id: Makes every document unique, so that a repeated write is recognised as our own.
    """

    version: str
    manifest_sha256: str
    generation: int
    moves: tuple[Move, ...] = ()
    rejected: tuple[str, ...] = ()
    # Left out where there are none, so that the signatures of states of before hold.
    rejections: tuple[Rejection, ...] = Field(default=(), exclude_if=lambda value: not value)
    action: Action | None = Field(default=None, exclude_if=lambda value: value is None)
    request_id: str
    reason: str
    actor: str
    at: str
