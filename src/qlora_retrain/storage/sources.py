"""Sources: what no step makes. Pinned when the plan is made, checked against the pin when they are fetched."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from qlora_retrain.core import hashing, safety, uris
from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import NotFound

# What a Hugging Face repository may give us: never code, never pickles.
_HF_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.jsonl", "*.csv", "*.parquet")


class PinnedFile(BaseModel):
    """One file of a source; `pin` is `sha256:<hex>`, `etag:<tag>` or `commit:<hex>`."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    pin: str


class Pinned(BaseModel):
    """A source as the plan found it; its key comes from the content, never from the URI."""

    model_config = ConfigDict(frozen=True)
    uri: str
    files: tuple[PinnedFile, ...]
    patterns: tuple[str, ...] = ("**",)

    def subset(self, only: Sequence[str]) -> Pinned:
        """The source with only the files that match; a commit's files are unknown: its patterns shrink."""
        if not only:
            return self
        if self.uri.startswith("hf://"):
            return self.model_copy(update={"patterns": tuple(only)})
        return self.model_copy(update={"files": tuple(f for f in self.files if matches(f.path, only))})

    def key(self) -> str:
        """The content's address."""
        pins = sorted((f.path, f.size_bytes, f.pin) for f in self.files)
        return hashing.digest({"files": pins, "patterns": self.patterns if self.uri.startswith("hf://") else None})


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a relative path matches one of the globs; `**` matches everything, a leading `**/` any folder or none."""
    names = [p.removeprefix("**/") for p in patterns]
    return any(p in ("**", path) or fnmatch.fnmatchcase(path, p) or (p and PurePosixPath(path).match(p)) for p in names)


def pin(name: str, uri: str, patterns: Sequence[str]) -> Pinned:
    """Look at a source and fix its content.

    Args:
        name: The source's name, for messages.
        uri: A folder or a file: `file://`, `s3://` or `hf://owner/name@commit`.
        patterns: Which of its files count.

    Raises:
        UsageError: If nothing is there, or a Hugging Face source names no commit.
        IntegrityError: If a model source holds code or pickles.
    """
    scheme = urlsplit(uri).scheme
    if scheme == "hf":
        return _pin_commit(name, uri, patterns)
    if scheme == "file" and (single := uris.local_path(uri)).is_file():
        uri, files = single.parent.as_uri(), [_pin_file(single, single.parent)]
    else:
        files = _pin_local(name, uri, patterns) if scheme == "file" else _pin_s3(uri, patterns)
    if not files:
        hint = "; for one object, give its folder as uri and its name in files" if scheme == "s3" else ""
        raise UsageError(f"sources.{name}: {uris.masked(uri)} has no files that match {', '.join(patterns)}{hint}")
    pinned = Pinned(uri=uri, files=tuple(files))
    if name == "base_model":
        _refuse_unsafe(pinned)
    return pinned


def documents(source: Pinned, names: Sequence[str]) -> dict[str, Any]:
    """The JSON objects in the files of these names that the source is known to have; a commit's files are not known.

    Raises:
        IntegrityError: If a file holds something else.
    """
    found: dict[str, Any] = {}
    for path in (file.path for file in source.files if file.path in names):
        try:
            found[path] = json.loads(open_store(source.uri).read(path).data)
        except ValueError as error:
            raise IntegrityError(f"{uris.masked(source.uri)}: {path} is not valid JSON: {error}") from error
        if not isinstance(found[path], dict):
            raise IntegrityError(f"{uris.masked(source.uri)}: {path} is not a JSON object")
    return found


def fetch(source: Pinned, folder: Path) -> None:
    """Copy the source's files into `folder` and check each against its pin.

    Raises:
        IntegrityError: If a file changed since the plan was made.
    """
    if source.uri.startswith("hf://"):
        _fetch_commit(source, folder)
        return
    try:
        open_store(source.uri).download("", [f.path for f in source.files], folder)
    except NotFound as error:
        raise IntegrityError(
            f"{uris.masked(source.uri)}: {error} is gone since the plan was made; plan again"
        ) from error
    for file in source.files:
        found = f"sha256:{hashing.sha256_file(folder / file.path)}" if file.pin.startswith("sha256:") else None
        if (folder / file.path).stat().st_size != file.size_bytes or (found and found != file.pin):
            raise IntegrityError(
                f"{uris.masked(source.uri)}: {file.path} is not what the plan pinned; it changed since: plan again"
            )
    if any(f.pin.startswith("etag:") for f in source.files):
        now = {f.path: f.pin for f in _pin_s3(source.uri, ("**",))}
        changed = [f.path for f in source.files if now.get(f.path) != f.pin]
        if changed:
            raise IntegrityError(f"{uris.masked(source.uri)}: {changed[0]} changed since the plan was made; plan again")


def _pin_local(name: str, uri: str, patterns: Sequence[str]) -> list[PinnedFile]:
    path = uris.local_path(uri)
    if not path.is_dir():
        raise UsageError(f"sources.{name}: {path} does not exist; wanted a file or a folder")
    found = sorted(p for p in path.rglob("*") if p.is_file() and matches(p.relative_to(path).as_posix(), patterns))
    return [_pin_file(p, path) for p in found]


def _pin_file(path: Path, folder: Path) -> PinnedFile:
    return PinnedFile(
        path=path.relative_to(folder).as_posix(),
        size_bytes=path.stat().st_size,
        pin=f"sha256:{hashing.sha256_file(path)}",
    )


def _pin_s3(uri: str, patterns: Sequence[str]) -> list[PinnedFile]:
    found = [e for e in open_store(uri).list("") if matches(e.path, patterns)]
    return [PinnedFile(path=e.path, size_bytes=e.size_bytes, pin=f"etag:{e.tag}") for e in found]


def _pin_commit(name: str, uri: str, patterns: Sequence[str]) -> Pinned:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})", uri)
    if match is None:
        raise UsageError(f"sources.{name}: {uri}: wanted hf://owner/name@<40 hex of a commit>; a branch can move")
    allowed = tuple(patterns) if tuple(patterns) != ("**",) else _HF_FILES
    return Pinned(uri=uri, files=(PinnedFile(path="*", size_bytes=0, pin=f"commit:{match[2]}"),), patterns=allowed)


def _fetch_commit(source: Pinned, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, _, commit = source.uri.removeprefix("hf://").partition("@")
    try:
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=list(source.patterns))
    except HfHubHTTPError as error:
        refused = error.response is not None and 400 <= error.response.status_code < 500
        raise (UsageError if refused else TryAgain)(f"{source.uri}: cannot be downloaded: {error}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        offline = isinstance(error.__cause__ or error, OfflineModeIsEnabled)
        raise (UsageError if offline else TryAgain)(f"{source.uri}: cannot be reached: {error}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes, with times in them: no content
    safety.refuse_unsafe(folder)


def _refuse_unsafe(source: Pinned) -> None:
    """Refuse code and pickles before anything is fetched for real; only the small JSON files are read."""
    safety.refuse_names(f.path for f in source.files)
    for file in source.files:
        if file.path in safety.MAY_NAME_CODE:
            safety.refuse_code(file.path, open_store(source.uri).read(file.path).data)
