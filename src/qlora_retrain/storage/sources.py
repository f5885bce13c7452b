"""Sources: the inputs that no step makes. They are pinned when the plan is made, and checked against the pin later."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

from qlora_retrain.config import platform
from qlora_retrain.core import hashing, local_files, safety, uris
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.storage import hub, open_store
from qlora_retrain.storage.globs import matches
from qlora_retrain.storage.globs import matches_any as matches_any
from qlora_retrain.storage.pinned_source import PinnedFile as PinnedFile
from qlora_retrain.storage.pinned_source import PinnedSource as PinnedSource
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.source_folder import SourceFolder, glob_hint
from qlora_retrain.storage.store import NotFound, Store, validate_path

BASE = "base_model"
# The files that are taken from a Hugging Face repository. They are part of the key of every commit.
_HF_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.jsonl", "*.csv", "*.parquet")
# Further forms of data; those of a base are left as they are, since its patterns are part of its key.
_HF_DATA_FILES = ("*.ndjson", "*.jsonlines", "*.tsv", "*.arrow", "*.feather", "*.gz", "*.bz2", "*.xz", "*.zst", "*.lz4")
# Stands for any name in a folder, when a pattern is asked whether it leaves out the whole folder.
_ANY_NAME = "\ue000" * 40


def pin(name: str, uri: str, patterns: Sequence[str], access: SourceAccess | None = None) -> PinnedSource:
    """Look at a source and pin its content.

    Args:
        name: The source's name, for messages.
        uri: A folder or a file: `file://`, `s3://` or `hf://owner/name@commit`.
        patterns: Globs of the files that count.
        access: Where sources may lie; None: as the platform says.

    Raises:
        UsageError: If there are no such files, if one of them may not be read, or if a Hugging Face source names no
            commit.
        IntegrityError: If a base asks for code, has only pickles, or has a file that is far too large.
    """
    access = access or platform.load().access()
    scheme = urlsplit(uri).scheme
    try:
        _refuse_closed(uri, access)
        if scheme == "hf":
            return _pin_commit(name, uri, patterns)
        if scheme == "file":
            uri, files, left_out = _pin_local(name, uri, patterns, access)
        else:
            files, left_out = _pin_s3(name, uri, patterns, access)
    except UsageError as error:
        raise UsageError(f"sources.{name}: {error}") from error

    if name == BASE:
        safety.refuse_only_pickles((f.path for f in files), left_out, name)
    if not files:
        hint = "; for one object, give its folder as uri and its name in files" if scheme == "s3" else ""
        raise UsageError(
            f"sources.{name}: {uris.mask_secrets(uri)} has no files that match {', '.join(patterns)}{hint}"
        )
    pinned = PinnedSource(uri=uri, files=tuple(files), left_out=tuple(left_out))
    if name == BASE:
        safety.refuse_content(((f.path, f.size_bytes) for f in files), open_source(uri, access).read_start, name)
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


def open_source(uri: str, access: SourceAccess | None = None) -> Store | SourceFolder:
    """Open a source whose files are listed, for reading.

    Raises:
        UsageError: If it may not be read.
    """
    access = access or platform.load().access()
    if urlsplit(uri).scheme == "file":
        return SourceFolder(uris.local_path(uri), access)  # which looks at every file that it opens
    _refuse_closed(uri, access)
    return open_store(uri)


def refuse_closed(source: PinnedSource, access: SourceAccess) -> None:
    """Refuse a source that may not be read; of one in a folder each file counts, and not what is beside it.

    Raises:
        UsageError: For such a source.
    """
    is_local = urlsplit(source.uri).scheme == "file"
    for uri in [f"{source.uri}/{quote(file.path)}" for file in source.files] if is_local else [source.uri]:
        _refuse_closed(uri, access)


def fetch(source: PinnedSource, folder: Path, access: SourceAccess | None = None) -> None:
    """Copy the source's files into `folder` and check each against its pin.

    Raises:
        UsageError: If it may not be read, or the files of a commit are not listed.
        IntegrityError: If a file changed since the plan was made.
    """
    access = access or platform.load().access()
    refuse_closed(source, access)
    if not source.is_listed:
        raise UsageError(f"{source.uri}: cannot be reached, so its files are not known; plan where the Hub is reached")
    try:
        if source.is_commit:
            hub.download(source.uri, source.as_files(), folder)
        else:
            open_source(source.uri, access).download("", [f.path for f in source.files], folder)
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


def _refuse_closed(uri: str, access: SourceAccess) -> None:
    if refusal := access.refusal(uri):
        raise UsageError(f"{uris.mask_secrets(uri)}: {refusal}")


def _pin_local(
    name: str, uri: str, patterns: Sequence[str], access: SourceAccess
) -> tuple[str, list[PinnedFile], list[str]]:
    """Pin a folder, or one file: then its folder is the source, with that file alone. Return the folder's URI too."""
    path = uris.local_path(uri)
    try:
        is_folder = Path(local_files.resolve(path, access)).is_dir()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected a file or a folder{glob_hint(path)}") from None
    folder = SourceFolder(path if is_folder else path.parent, access)
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    paths = [path.name]
    if is_folder:
        paths = folder.paths(
            lambda name: matches_any(name, patterns),
            lambda name: any(matches(f"{name}/{_ANY_NAME}", pattern) for pattern in excluded),
        )
    included, left_out = _split(name, paths)
    pins = [(p, *folder.size_and_sha256(p)) for p in included]
    files = [PinnedFile(path=p, size_bytes=size_bytes, pin=f"sha256:{sha256}") for p, size_bytes, sha256 in pins]
    return (path if is_folder else path.parent).as_uri(), files, left_out


def _split(name: str, paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the files that are taken, and those of a base that are left where they are."""
    included: list[str] = []
    left_out: list[str] = []
    for path in paths:
        (included if name != BASE or safety.is_model_file(path) else left_out).append(path)
    return included, left_out


def _pin_s3(name: str, uri: str, patterns: Sequence[str], access: SourceAccess) -> tuple[list[PinnedFile], list[str]]:
    store = S3Store(uri)
    entries = {e.path: e for e in store.list("") if matches_any(e.path, patterns)}
    included, left_out = _split(name, entries)
    # The store itself may lie below the source.
    for path in included:
        validate_path(path)  # now, and not when a step fetches it
        _refuse_closed(f"{uri}/{path}", access)
    files = [
        PinnedFile(path=path, size_bytes=entries[path].size_bytes, pin=f"sha256:{sha256}")
        for path, sha256 in zip(included, store.pinnable_hashes(included), strict=True)
    ]
    return files, left_out


def _pin_commit(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})", uri)
    if match is None:
        raise UsageError(f"{uri}: expected hf://owner/name@<40 hex of a commit>; a branch can move")
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
