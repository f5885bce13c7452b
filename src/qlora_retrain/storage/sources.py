"""Sources: the inputs that no step makes. They are pinned when the plan is made, and checked against the pin later.

The field names of `PinnedSource` and `PinnedFile` are the JSON of `plan.json`: never rename one.
"""

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

# The files that are taken from a Hugging Face repository: never code, never pickles.
_HF_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.jsonl", "*.csv", "*.parquet")


class PinnedFile(BaseModel):
    """One file of a source; `pin` is `sha256:<hex>`, `etag:<tag>` or `commit:<hex>`."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    pin: str


class PinnedSource(BaseModel):
    """A source as it was when the plan was made. Its key comes from the content, never from the URI."""

    model_config = ConfigDict(frozen=True)
    uri: str
    files: tuple[PinnedFile, ...]
    patterns: tuple[str, ...] = ("**",)

    def subset(self, only: Sequence[str]) -> PinnedSource:
        """Return the source with only the files that match."""
        if not only:
            return self
        # The files of a commit are not listed before they are downloaded, so the patterns are narrowed instead.
        if self.uri.startswith("hf://"):
            return self.model_copy(update={"patterns": tuple(only)})
        return self.model_copy(update={"files": tuple(f for f in self.files if matches_any(f.path, only))})

    def key(self) -> str:
        """Return the content's address."""
        pins = sorted((f.path, f.size_bytes, f.pin) for f in self.files)
        return hashing.sha256_json({"files": pins, "patterns": self.patterns if self.uri.startswith("hf://") else None})


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a relative path matches one of the globs.

    `**` matches every path, and a leading `**/` matches any folders or none.
    """
    # Python's globs know no `**` before 3.13, so its two common uses are handled here.
    names = [p.removeprefix("**/") for p in patterns]
    return any(p in ("**", path) or fnmatch.fnmatchcase(path, p) or (p and PurePosixPath(path).match(p)) for p in names)


def pin(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    """Look at a source and pin its content.

    Args:
        name: The source's name, for messages.
        uri: A folder or a file: `file://`, `s3://` or `hf://owner/name@commit`.
        patterns: Globs of the files that count.

    Raises:
        UsageError: If there are no such files, or a Hugging Face source names no commit.
        IntegrityError: If a model source holds code or pickles.
    """
    scheme = urlsplit(uri).scheme
    # A commit pins its files by itself, so nothing is listed or read.
    if scheme == "hf":
        return _pin_commit(name, uri, patterns)
    # One file: its folder is the source, with that file alone.
    if scheme == "file" and (single := uris.local_path(uri)).is_file():
        uri, files = single.parent.as_uri(), [_pin_file(single, single.parent)]
    else:
        files = _pin_local(name, uri, patterns) if scheme == "file" else _pin_s3(uri, patterns)

    if not files:
        hint = "; for one object, give its folder as uri and its name in files" if scheme == "s3" else ""
        raise UsageError(
            f"sources.{name}: {uris.mask_secrets(uri)} has no files that match {', '.join(patterns)}{hint}"
        )
    pinned = PinnedSource(uri=uri, files=tuple(files))
    if name == "base_model":
        _refuse_unsafe(pinned)
    return pinned


def read_json_files(source: PinnedSource, names: Sequence[str]) -> dict[str, Any]:
    """Return the JSON objects in the source's files of these names.

    The files of a commit are not listed before they are downloaded, so for a commit there are none.

    Raises:
        IntegrityError: If a file holds something else than a JSON object.
    """
    documents: dict[str, Any] = {}
    for path in (file.path for file in source.files if file.path in names):
        try:
            documents[path] = json.loads(open_store(source.uri).read(path).data)
        except ValueError as error:
            raise IntegrityError(f"{uris.mask_secrets(source.uri)}: {path} is not valid JSON: {error}") from error

        if not isinstance(documents[path], dict):
            raise IntegrityError(f"{uris.mask_secrets(source.uri)}: {path} is not a JSON object")
    return documents


def fetch(source: PinnedSource, folder: Path) -> None:
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
            f"{uris.mask_secrets(source.uri)}: {error} is gone since the plan was made; plan again"
        ) from error

    for file in source.files:
        actual = f"sha256:{hashing.sha256_file(folder / file.path)}" if file.pin.startswith("sha256:") else None
        if (folder / file.path).stat().st_size != file.size_bytes or (actual and actual != file.pin):
            raise IntegrityError(
                f"{uris.mask_secrets(source.uri)}: {file.path} is not what the plan pinned; "
                "it changed since: plan again"
            )

    # An ETag cannot be computed from the bytes, so the server is asked again: after the download, because a file that
    # changed during the download then has another ETag.
    if any(f.pin.startswith("etag:") for f in source.files):
        now = {f.path: f.pin for f in _pin_s3(source.uri, ("**",))}
        changed = [f.path for f in source.files if now.get(f.path) != f.pin]
        if changed:
            raise IntegrityError(
                f"{uris.mask_secrets(source.uri)}: {changed[0]} changed since the plan was made; plan again"
            )


def _pin_local(name: str, uri: str, patterns: Sequence[str]) -> list[PinnedFile]:
    path = uris.local_path(uri)
    if not path.is_dir():
        raise UsageError(f"sources.{name}: {path} does not exist; expected a file or a folder")
    paths = sorted(p for p in path.rglob("*") if p.is_file() and matches_any(p.relative_to(path).as_posix(), patterns))
    return [_pin_file(p, path) for p in paths]


def _pin_file(path: Path, folder: Path) -> PinnedFile:
    return PinnedFile(
        path=path.relative_to(folder).as_posix(),
        size_bytes=path.stat().st_size,
        pin=f"sha256:{hashing.sha256_file(path)}",
    )


def _pin_s3(uri: str, patterns: Sequence[str]) -> list[PinnedFile]:
    """Pin by ETag, which the listing has: to hash the files, the plan would have to download all of them."""
    entries = [e for e in open_store(uri).list("") if matches_any(e.path, patterns)]
    return [PinnedFile(path=e.path, size_bytes=e.size_bytes, pin=f"etag:{e.tag}") for e in entries]


def _pin_commit(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})", uri)
    if match is None:
        raise UsageError(f"sources.{name}: {uri}: expected hf://owner/name@<40 hex of a commit>; a branch can move")
    # The commit pins every file. No request is made, so that a plan needs no access to the hub.
    allowed = tuple(patterns) if tuple(patterns) != ("**",) else _HF_FILES
    return PinnedSource(
        uri=uri, files=(PinnedFile(path="*", size_bytes=0, pin=f"commit:{match[2]}"),), patterns=allowed
    )


def _fetch_commit(source: PinnedSource, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # A 4xx answer (no such commit, no access) stays the same on a retry, and so does the offline mode.
    repository, _, commit = source.uri.removeprefix("hf://").partition("@")
    try:
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=list(source.patterns))
    except HfHubHTTPError as error:
        is_refused = error.response is not None and 400 <= error.response.status_code < 500
        raise (UsageError if is_refused else TryAgain)(f"{source.uri}: cannot be downloaded: {error}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        is_offline = isinstance(error.__cause__ or error, OfflineModeIsEnabled)
        raise (UsageError if is_offline else TryAgain)(f"{source.uri}: cannot be reached: {error}") from error
    # The client's own notes: they hold times, and are no content of the commit.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    safety.refuse_unsafe(folder)


def _refuse_unsafe(source: PinnedSource) -> None:
    """Refuse code and pickles before the plan is made; of the files only the small JSON ones are read."""
    safety.refuse_names(f.path for f in source.files)
    for file in source.files:
        if file.path in safety.MAY_NAME_CODE:
            safety.refuse_code(file.path, open_store(source.uri).read(file.path).data)
