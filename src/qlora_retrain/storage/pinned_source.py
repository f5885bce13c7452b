"""A source as the plan pins it.

The field names of both models are the JSON of `plan.json`: never rename one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qlora_retrain.core import hashing
from qlora_retrain.storage import globs
from qlora_retrain.storage.artifact import File

# Of the files that no pattern takes, in the plan.
MAX_NAMES = 5


class PinnedFile(BaseModel):
    """One file of a source; `pin` is `sha256:<hex>` or `commit:<hex>`."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    pin: str

    @property
    def is_commit(self) -> bool:
        """Whether this is the entry that stands for a commit, and no file."""
        return self.pin.startswith("commit:")


class Unmatched(BaseModel):
    """How many files of a source its patterns do not take for one reason, and the first of their names.

    The reasons are: no pattern takes it, it is hidden (its name or its folder's begins with a dot), and it is a folder
    that was not looked into, whose name ends in a slash.
    """

    model_config = ConfigDict(frozen=True)
    reason: Literal["pattern", "hidden", "folder"]
    count: int
    names: tuple[str, ...]


class PinnedSource(BaseModel):
    """A source as it was when the plan was made. Its key comes from the content, never from the URI.

    Attributes:
        uri: Where it is.
        files: Its files. The first entry of a commit is the commit itself, and the only one where neither the Hub nor a
            cache could list its files.
        patterns: The globs of a commit's files; one without a slash is a name in whatever folder.
        left_out: The files of a base that match its patterns and that no model is loaded from.
        unmatched: The files that the patterns do not take.
        only: Names of the part of a commit that a step reads; empty: all of it.
    """

    model_config = ConfigDict(frozen=True)
    uri: str
    files: tuple[PinnedFile, ...]
    patterns: tuple[str, ...] = ("**",)
    # Plans of earlier releases have no such field, and their bytes are hashed.
    left_out: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    unmatched: tuple[Unmatched, ...] = Field((), exclude_if=lambda groups: not groups)
    # Not part of a plan: it is set where a step fetches its part.
    only: tuple[str, ...] = Field((), exclude=True)

    @property
    def is_commit(self) -> bool:
        """Whether it is a commit of the Hugging Face Hub."""
        return self.uri.startswith("hf://")

    @property
    def content(self) -> tuple[PinnedFile, ...]:
        """Its files, without the entry of the commit itself."""
        return tuple(file for file in self.files if not file.is_commit)

    @property
    def is_listed(self) -> bool:
        """Whether the files of a commit are known."""
        return not self.is_commit or bool(self.content)

    def subset(self, only: Sequence[str]) -> PinnedSource:
        """Return the source with only the files of these names, in whatever folder."""
        if not only:
            return self
        files = tuple(f for f in self.files if f.is_commit or globs.matches_name(f.path, only))
        return self.model_copy(update={"files": files, "only": tuple(only) if self.is_commit else ()})

    def as_files(self) -> tuple[File, ...]:
        """Return the files by their hashes."""
        return tuple(
            File(path=f.path, size_bytes=f.size_bytes, sha256=f.pin.removeprefix("sha256:")) for f in self.content
        )

    def key(self) -> str:
        """Return the content's address."""
        # A commit alone, so that the key does not depend on whether its files could be listed.
        pins = sorted((f.path, f.size_bytes, f.pin) for f in self.files if f.is_commit or not self.is_commit)
        part = {"only": self.only} if self.only else {}
        return hashing.sha256_json({"files": pins, "patterns": self.patterns if self.is_commit else None, **part})


def group_unmatched(paths: Iterable[str], patterns: Sequence[str]) -> tuple[Unmatched, ...]:
    """Return the files that no pattern takes by the reason, each with the first names."""
    groups: dict[Literal["pattern", "hidden", "folder"], list[str]] = {"pattern": [], "hidden": [], "folder": []}
    for path in paths:
        if path.endswith("/"):
            groups["folder"].append(path)
        else:
            is_hidden = re.search(r"(^|/)\.", path) and globs.matches_any(path, patterns, with_hidden=True)
            groups["hidden" if is_hidden else "pattern"].append(path)
    return tuple(
        Unmatched(reason=reason, count=len(names), names=tuple(names[:MAX_NAMES]))
        for reason, names in groups.items()
        if names
    )
