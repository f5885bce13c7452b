"""Sources: the inputs that no step makes. They are pinned when the plan is made, and checked against the pin later.

The field names of `PinnedSource` and `PinnedFile` are the JSON of `plan.json`: never rename one.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from qlora_retrain.core import hashing, safety, uris
from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import open_store
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import NotFound

# The files that are taken from a Hugging Face repository: never code, never pickles.
_HF_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.jsonl", "*.csv", "*.parquet")
# Further forms of data; those of a base are left as they are, since its patterns are part of its key.
_HF_DATA_FILES = ("*.ndjson", "*.jsonlines", "*.tsv", "*.arrow", "*.feather", "*.gz", "*.bz2", "*.xz", "*.zst", "*.lz4")


class PinnedFile(BaseModel):
    """One file of a source; `pin` is `sha256:<hex>` or `commit:<hex>`."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    pin: str


class PinnedSource(BaseModel):
    """A source as it was when the plan was made. Its key comes from the content, never from the URI.

    Attributes:
        uri: Where it is.
        files: Its files. The files of a commit are not listed before they are downloaded, so a commit has one entry.
        patterns: The globs of a commit's files.
        only: Globs of the part of a commit that a step reads; empty: all of it.
    """

    model_config = ConfigDict(frozen=True)
    uri: str
    files: tuple[PinnedFile, ...]
    patterns: tuple[str, ...] = ("**",)
    # Not part of a plan: it is set where a step fetches its part.
    only: tuple[str, ...] = Field((), exclude=True)

    @property
    def is_commit(self) -> bool:
        """Whether its files are listed only once they are downloaded."""
        return self.uri.startswith("hf://")

    def subset(self, only: Sequence[str]) -> PinnedSource:
        """Return the source with only the files that match."""
        if not only:
            return self
        if self.is_commit:
            return self.model_copy(update={"only": tuple(only)})
        return self.model_copy(update={"files": tuple(f for f in self.files if matches_any(f.path, only))})

    def as_files(self) -> tuple[File, ...] | None:
        """Return the files by their hashes; None for a commit, whose files are not listed yet."""
        if self.is_commit:
            return None
        return tuple(
            File(path=f.path, size_bytes=f.size_bytes, sha256=f.pin.removeprefix("sha256:")) for f in self.files
        )

    def key(self) -> str:
        """Return the content's address."""
        pins = sorted((f.path, f.size_bytes, f.pin) for f in self.files)
        part = {"only": self.only} if self.only else {}
        return hashing.sha256_json({"files": pins, "patterns": self.patterns if self.is_commit else None, **part})


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a relative path matches one of the globs, and none of those that begin with `!`.

    `**` matches every path, and `**/` matches any folders or none. A folder's name matches all that lies in it, and
    `{a,b}` stands for either.
    """
    included = [p for p in patterns if not p.startswith("!")]
    excluded = [p[1:] for p in patterns if p.startswith("!")]
    # Only exclusions: of every file.
    is_included = any(_matches(path, p) for p in included) if included else bool(excluded)
    return is_included and not any(_matches(path, p) for p in excluded)


def _matches(path: str, pattern: str) -> bool:
    if path == pattern:
        return True
    if braces := re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", pattern):
        return any(_matches(path, f"{braces[1]}{choice}{braces[3]}") for choice in braces[2].split(","))

    # Python's globs know no `**` before 3.13, so its common uses are handled here.
    glob = pattern.removeprefix("./").removeprefix("**/")
    is_match = glob == "**" or any(fnmatch.fnmatchcase(path, form) for form in (glob, glob.replace("/**/", "/")))
    is_in_folder = bool(glob.rstrip("/")) and path.startswith(glob.rstrip("/") + "/")
    return is_match or is_in_folder or bool(glob and PurePosixPath(path).match(glob))


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


def fetch(source: PinnedSource, folder: Path) -> None:
    """Copy the source's files into `folder` and check each against its pin.

    Raises:
        IntegrityError: If a file changed since the plan was made.
    """
    if source.is_commit:
        _fetch_commit(source, folder)
        return

    try:
        open_store(source.uri).download("", [f.path for f in source.files], folder)
    except NotFound as error:
        raise IntegrityError(
            f"{uris.mask_secrets(source.uri)}: {error} is gone since the plan was made; plan again"
        ) from error

    for file in source.files:
        if f"sha256:{hashing.sha256_file(folder / file.path)}" != file.pin:
            raise IntegrityError(
                f"{uris.mask_secrets(source.uri)}: {file.path} is not what the plan pinned; "
                "it changed since: plan again"
            )


def _pin_local(name: str, uri: str, patterns: Sequence[str]) -> list[PinnedFile]:
    path = uris.local_path(uri)
    if not path.is_dir():
        raise UsageError(f"sources.{name}: {path} does not exist; expected a file or a folder{_glob_hint(path)}")
    paths = sorted(p for p in path.rglob("*") if p.is_file() and matches_any(p.relative_to(path).as_posix(), patterns))
    return [_pin_file(p, path) for p in paths]


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


def _pin_s3(uri: str, patterns: Sequence[str]) -> list[PinnedFile]:
    store = S3Store(uri)
    entries = [e for e in store.list("") if matches_any(e.path, patterns)]
    hashes = store.pinnable_hashes(e.path for e in entries)
    return [
        PinnedFile(path=e.path, size_bytes=e.size_bytes, pin=f"sha256:{sha256}")
        for e, sha256 in zip(entries, hashes, strict=True)
    ]


def _pin_commit(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})", uri)
    if match is None:
        raise UsageError(f"sources.{name}: {uri}: expected hf://owner/name@<40 hex of a commit>; a branch can move")
    # Every file of a repository would be code and pickles too. Exclusions alone are of every file.
    excluded = tuple(p for p in patterns if p.startswith("!"))
    included = tuple(p for p in patterns if not p.startswith("!")) or ("**",)
    every_file = _HF_FILES if name == "base_model" else _HF_FILES + _HF_DATA_FILES
    allowed = tuple(glob for p in included for glob in (every_file if p == "**" else (p,)))
    # The commit pins every file. No request is made, so that a plan needs no access to the hub.
    return PinnedSource(
        uri=uri, files=(PinnedFile(path="*", size_bytes=0, pin=f"commit:{match[2]}"),), patterns=allowed + excluded
    )


def _fetch_commit(source: PinnedSource, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # A 4xx answer (no such commit, no access) stays the same on a retry, and so does the offline mode.
    repository, _, commit = source.uri.removeprefix("hf://").partition("@")
    allowed = [p for p in source.only or source.patterns if not p.startswith("!")]
    excluded = [p[1:] for p in source.patterns if p.startswith("!")]
    # The client's globs need a folder where they have `**/`, and know neither braces nor a folder's name alone.
    allowed += [p.replace("**/", "") for p in allowed if "**/" in p]
    allowed = [re.sub(r"\{[^{}]*\}", "*", p) for p in allowed] + [f"{p.rstrip('/')}/*" for p in allowed]
    try:
        options: dict[str, Any] = {"ignore_patterns": excluded} if excluded else {}
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=allowed, **options)
    except HfHubHTTPError as error:
        is_refused = error.response is not None and 400 <= error.response.status_code < 500
        raise (UsageError if is_refused else TryAgain)(f"{source.uri}: cannot be downloaded: {error}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        is_offline = isinstance(error.__cause__ or error, OfflineModeIsEnabled)
        raise (UsageError if is_offline else TryAgain)(f"{source.uri}: cannot be reached: {error}") from error
    # The client's own notes: they hold times, and are no content of the commit.
    shutil.rmtree(folder / ".cache", ignore_errors=True)

    # The client's globs differ a little from ours, which decide everywhere else.
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() or p.is_symlink()}
    for name, path in list(paths.items()):
        if not (matches_any(name, source.patterns) and (not source.only or matches_any(name, source.only))):
            path.unlink()
            del paths[name]
    if not paths:
        raise UsageError(f"{source.uri}: has no files that match {', '.join(source.only or source.patterns)}")
    safety.refuse_unsafe(folder)


def _refuse_unsafe(source: PinnedSource) -> None:
    """Refuse code and pickles before the plan is made; of the files only the small JSON ones are read."""
    paths = [f.path for f in source.files]
    # Where the pickles are the model, leaving them out would leave nothing.
    has_weights = any(path.endswith(".safetensors") for path in paths)
    safety.refuse_names(paths, hint="leave such files out with sources.base_model.files" if has_weights else "")
    for file in source.files:
        if file.path in safety.MAY_NAME_CODE:
            safety.refuse_code(file.path, open_store(source.uri).read(file.path).data)
