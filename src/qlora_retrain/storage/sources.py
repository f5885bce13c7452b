"""Sources: the inputs that no step makes. They are pinned when the plan is made, and checked against the pin later.

The field names of `PinnedSource` and `PinnedFile` are the JSON of `plan.json`: never rename one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from qlora_retrain.core import hashing, safety, uris
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import hub, open_store
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.globs import matches_any as matches_any
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import NotFound

BASE = "base_model"
# The files that are taken from a Hugging Face repository. They are part of the key of every commit.
_HF_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.jsonl", "*.csv", "*.parquet")
# Further forms of data; those of a base are left as they are, since its patterns are part of its key.
_HF_DATA_FILES = ("*.ndjson", "*.jsonlines", "*.tsv", "*.arrow", "*.feather", "*.gz", "*.bz2", "*.xz", "*.zst", "*.lz4")


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


class PinnedSource(BaseModel):
    """A source as it was when the plan was made. Its key comes from the content, never from the URI.

    Attributes:
        uri: Where it is.
        files: Its files. The first entry of a commit is the commit itself, and the only one where neither the Hub nor a
            cache could list its files.
        patterns: The globs of a commit's files.
        left_out: The files of a base that match its patterns and that no model is loaded from.
        only: Globs of the part of a commit that a step reads; empty: all of it.
    """

    model_config = ConfigDict(frozen=True)
    uri: str
    files: tuple[PinnedFile, ...]
    patterns: tuple[str, ...] = ("**",)
    # Plans of earlier releases have no such field, and their bytes are hashed.
    left_out: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
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
        """Return the source with only the files that match."""
        if not only:
            return self
        files = tuple(f for f in self.files if f.is_commit or matches_any(f.path, only))
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


def pin(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    """Look at a source and pin its content.

    Args:
        name: The source's name, for messages.
        uri: A folder or a file: `file://`, `s3://` or `hf://owner/name@commit`.
        patterns: Globs of the files that count.

    Raises:
        UsageError: If there are no such files, or a Hugging Face source names no commit.
        IntegrityError: If a base asks for code, has only pickles, or has a file that is far too large.
    """
    scheme = urlsplit(uri).scheme
    if scheme == "hf":
        return _pin_commit(name, uri, patterns)
    # One file: its folder is the source, with that file alone.
    if scheme == "file" and (single := uris.local_path(uri)).is_file():
        uri, patterns = single.parent.as_uri(), [single.name]
        files, left_out = _pin_files(single.parent, [single], name)
    elif scheme == "file":
        files, left_out = _pin_local(name, uri, patterns)
    else:
        files, left_out = _pin_s3(name, uri, patterns)

    if name == BASE:
        safety.refuse_only_pickles((f.path for f in files), left_out, name)
    if not files:
        hint = "; for one object, give its folder as uri and its name in files" if scheme == "s3" else ""
        raise UsageError(
            f"sources.{name}: {uris.mask_secrets(uri)} has no files that match {', '.join(patterns)}{hint}"
        )
    pinned = PinnedSource(uri=uri, files=tuple(files), left_out=tuple(left_out))
    if name == BASE:
        safety.refuse_content(((f.path, f.size_bytes) for f in files), open_store(uri).read_start, name)
    return pinned


def list_commit(name: str, source: PinnedSource) -> PinnedSource:
    """Return a source with its files; a commit whose files the plan could not list is listed now.

    Raises:
        UsageError: If there is no such commit, no access to it, or no request may be made.
        TryAgain: If the Hub cannot be reached.
    """
    if source.is_listed:
        return source
    try:
        return _list_commit(name, source, source.patterns)
    except hub.Unreachable as unreachable:
        raise unreachable.as_problem() from unreachable


def fetch(source: PinnedSource, folder: Path) -> None:
    """Copy the source's files into `folder` and check each against its pin.

    Raises:
        UsageError: If the files of a commit are not listed.
        IntegrityError: If a file changed since the plan was made.
    """
    if not source.is_listed:
        raise UsageError(f"{source.uri}: cannot be reached, so its files are not known; plan where the Hub is reached")
    try:
        if source.is_commit:
            hub.download(source.uri, source.as_files(), folder)
        else:
            open_store(source.uri).download("", [f.path for f in source.files], folder)
    except NotFound as error:
        raise IntegrityError(
            f"{uris.mask_secrets(source.uri)}: {error} is gone since the plan was made; plan again"
        ) from error

    for file in source.as_files():
        path = folder / file.path
        if not path.is_file() or hashing.sha256_file(path) != file.sha256:
            raise IntegrityError(
                f"{uris.mask_secrets(source.uri)}: {file.path} is not what the plan pinned; "
                "it changed since: plan again"
            )


def _pin_local(name: str, uri: str, patterns: Sequence[str]) -> tuple[list[PinnedFile], list[str]]:
    path = uris.local_path(uri)
    if not path.is_dir():
        raise UsageError(f"sources.{name}: {path} does not exist; expected a file or a folder{_glob_hint(path)}")
    paths = sorted(p for p in path.rglob("*") if p.is_file() and matches_any(p.relative_to(path).as_posix(), patterns))
    return _pin_files(path, paths, name)


def _pin_files(folder: Path, paths: Sequence[Path], name: str) -> tuple[list[PinnedFile], list[str]]:
    """Pin files below a folder; of a base, leave out and name those that no model is loaded from."""
    included, left_out = _split(name, (path.relative_to(folder).as_posix() for path in paths))
    return [_pin_file(folder / path, folder) for path in included], left_out


def _split(name: str, paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the files that are taken, and those of a base that are left where they are."""
    included: list[str] = []
    left_out: list[str] = []
    for path in paths:
        (included if name != BASE or safety.is_model_file(path) else left_out).append(path)
    return included, left_out


def _glob_hint(path: Path) -> str:
    """Return how to write a path that is a glob, such as `data/*.jsonl`; empty for any other path."""
    first = next((i for i, part in enumerate(path.parts) if re.search(r"[*?\[{]", part)), None)
    if first is None:
        return ""
    folder, glob = Path(*path.parts[:first]), "/".join(path.parts[first:])
    return f'. Globs belong in files: {{uri: {folder}, files: ["{glob}"]}}'


def _pin_file(path: Path, folder: Path) -> PinnedFile:
    return PinnedFile(
        path=path.relative_to(folder).as_posix(),
        size_bytes=path.stat().st_size,
        pin=f"sha256:{hashing.sha256_file(path)}",
    )


def _pin_s3(name: str, uri: str, patterns: Sequence[str]) -> tuple[list[PinnedFile], list[str]]:
    store = S3Store(uri)
    entries = {e.path: e for e in store.list("") if matches_any(e.path, patterns)}
    included, left_out = _split(name, entries)
    files = [
        PinnedFile(path=path, size_bytes=entries[path].size_bytes, pin=f"sha256:{sha256}")
        for path, sha256 in zip(included, store.pinnable_hashes(included), strict=True)
    ]
    return files, left_out


def _pin_commit(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})", uri)
    if match is None:
        raise UsageError(f"sources.{name}: {uri}: expected hf://owner/name@<40 hex of a commit>; a branch can move")
    # Exclusions alone are of every file.
    excluded = tuple(p for p in patterns if p.startswith("!"))
    included = tuple(p for p in patterns if not p.startswith("!")) or ("**",)
    every_file = _HF_FILES if name == BASE else _HF_FILES + _HF_DATA_FILES
    allowed = tuple(glob for p in included for glob in (every_file if p == "**" else (p,)))
    commit = PinnedFile(path="*", size_bytes=0, pin=f"commit:{match[2]}")
    pinned = PinnedSource(uri=uri, files=(commit,), patterns=allowed + excluded)
    # A plan needs no access to the Hub: the steps that have it list the files then.
    with contextlib.suppress(hub.Unreachable):
        return _list_commit(name, pinned, patterns)
    return pinned


def _list_commit(name: str, source: PinnedSource, patterns: Sequence[str]) -> PinnedSource:
    """Return a commit's source with its files by their hashes; `patterns` are the line's own, for what is left out."""

    def is_wanted(path: str) -> bool:
        return matches_any(path, source.patterns) and (name != BASE or safety.is_model_file(path))

    def check(folder: Path) -> None:
        if name == BASE:
            safety.refuse_unsafe(folder, name)

    files, others = hub.list_files(source.uri, is_wanted, check)
    left_out = tuple(path for path in others if name == BASE and matches_any(path, patterns))
    if name == BASE:
        safety.refuse_only_pickles((f.path for f in files), left_out, name)
    if not files:
        raise UsageError(f"{source.uri}: has no files that match {', '.join(source.patterns)}")
    pins = tuple(PinnedFile(path=f.path, size_bytes=f.size_bytes, pin=f"sha256:{f.sha256}") for f in files)
    return source.model_copy(update={"files": (*source.files, *pins), "left_out": left_out})
