"""Sources: the inputs that no step makes. They are pinned when the plan is made, and checked against the pin later."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from qlora_retrain.config import platform
from qlora_retrain.core import hashing, local_files, safety, uris
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.storage import globs, hub, open_store
from qlora_retrain.storage.nearest_files import explain_no_match
from qlora_retrain.storage.pinned_source import PinnedFile as PinnedFile
from qlora_retrain.storage.pinned_source import PinnedSource as PinnedSource
from qlora_retrain.storage.pinned_source import group_unmatched
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.source_folder import SourceFolder, glob_hint
from qlora_retrain.storage.store import NotFound, Store, validate_path

BASE = "base_model"
# The files that are taken from a Hugging Face repository, in whatever folder: these are names and no globs of a line.
# They are part of the key of every commit.
_HF_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.jsonl", "*.csv", "*.parquet")
# Further forms of data; those of a base are left as they are, since its patterns are part of its key.
_HF_DATA_FILES = ("*.ndjson", "*.jsonlines", "*.tsv", "*.arrow", "*.feather", "*.gz", "*.bz2", "*.xz", "*.zst", "*.lz4")


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
            uri, files, unused = _pin_local(name, uri, patterns, access)
        else:
            files, unused = _pin_s3(name, uri, patterns, access)
    except UsageError as error:
        raise UsageError(f"sources.{name}: {error}") from error

    if name == BASE:
        safety.refuse_only_pickles((f.path for f in files), unused.left_out, name)
    if not files:
        hint = "; for one object, give its folder as uri and its name in files" if scheme == "s3" else ""
        raise UsageError(f"sources.{name}: {uris.mask_secrets(uri)}{_explain_no_files(unused, patterns)}{hint}")
    unmatched = group_unmatched(unused.unmatched, patterns)
    pinned = PinnedSource(uri=uri, files=tuple(files), left_out=tuple(unused.left_out), unmatched=unmatched)
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


class _Unused(NamedTuple):
    """The files of a source that are not pinned: those of a base that no model is loaded from, and the unmatched."""

    left_out: list[str]
    unmatched: list[str]


def _pin_local(
    name: str, uri: str, patterns: Sequence[str], access: SourceAccess
) -> tuple[str, list[PinnedFile], _Unused]:
    """Pin a folder, or one file: then its folder is the source, with that file alone. Return the folder's URI too."""
    path = uris.local_path(uri)
    try:
        is_folder = Path(local_files.resolve(path, access)).is_dir()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected a file or a folder{glob_hint(path)}") from None
    folder = SourceFolder(path if is_folder else path.parent, access)
    matching, others = folder.paths(patterns) if is_folder else ([path.name], [])
    included, unused = _split(name, matching, others, patterns)
    pins = [(p, *folder.size_and_sha256(p)) for p in included]
    files = [PinnedFile(path=p, size_bytes=size_bytes, pin=f"sha256:{sha256}") for p, size_bytes, sha256 in pins]
    return (path if is_folder else path.parent).as_uri(), files, unused


def _split(name: str, matching: list[str], others: list[str], patterns: Sequence[str]) -> tuple[list[str], _Unused]:
    """Return the files that are taken, and all others; hidden files of a base are such that no model is loaded from."""
    if name != BASE:
        return matching, _Unused([], others)
    hidden = {path for path in others if globs.matches_any(path, patterns, with_hidden=True)}
    left_out = [*hidden, *(path for path in matching if not safety.is_model_file(path))]
    included = [path for path in matching if safety.is_model_file(path)]
    return included, _Unused(sorted(left_out), [path for path in others if path not in hidden])


def _explain_no_files(unused: _Unused, patterns: Sequence[str]) -> str:
    text = f" has no files that match {', '.join(patterns)}"
    if unused.left_out:
        return f"{text} and are a model's; it has {len(unused.left_out)} others, such as {unused.left_out[0]}"
    return text + explain_no_match(unused.unmatched, patterns)


def _pin_s3(name: str, uri: str, patterns: Sequence[str], access: SourceAccess) -> tuple[list[PinnedFile], _Unused]:
    store = S3Store(uri)
    entries = {entry.path: entry for entry in store.list("")}
    matching = [path for path in entries if globs.matches_any(path, patterns)]
    included, unused = _split(name, matching, sorted(entries.keys() - {*matching}), patterns)
    # The store itself may lie below the source.
    for path in included:
        validate_path(path)  # now, and not when a step fetches it
        _refuse_closed(f"{uri}/{path}", access)
    files = [
        PinnedFile(path=path, size_bytes=entries[path].size_bytes, pin=f"sha256:{sha256}")
        for path, sha256 in zip(included, store.pinnable_hashes(included), strict=True)
    ]
    return files, unused


def _pin_commit(name: str, uri: str, patterns: Sequence[str]) -> PinnedSource:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([0-9a-f]{40})", uri)
    if match is None:
        raise UsageError(f"{uri}: expected hf://owner/name@<40 hex of a commit>; a branch can move")
    included, excluded = globs.split_exclusions(patterns)
    every_file = _HF_FILES if name == BASE else _HF_FILES + _HF_DATA_FILES
    allowed = [names for glob in included for names in (every_file if glob == "**" else (_anchored(glob),))]
    refused = [f"!{_anchored(glob)}" for glob in excluded]
    commit = PinnedFile(path="*", size_bytes=0, pin=f"commit:{match[2]}")
    pinned = PinnedSource(uri=uri, files=(commit,), patterns=(*allowed, *refused))
    # A plan needs no access to the Hub: the steps that have it list the files then.
    with contextlib.suppress(hub.Unreachable):
        return _list_commit(name, pinned, patterns)
    return pinned


def _anchored(glob: str) -> str:
    """Return a line's glob with a slash, so that it is not taken for one of our names in whatever folder."""
    return glob if "/" in glob else f"./{glob}"


def _is_taken(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a file of a commit has one of our names or matches a line's glob, and none leaves it out."""
    included, excluded = globs.split_exclusions(patterns)
    has_name = globs.matches_name(path, [pattern for pattern in included if "/" not in pattern])
    return (has_name or globs.matches_any(path, included)) and not globs.matches_any(path, excluded, with_hidden=True)


def _list_commit(name: str, source: PinnedSource, patterns: Sequence[str]) -> PinnedSource:
    """Return a commit's source with its files by their hashes; `patterns` are the line's own, for what is left out."""

    def is_wanted(path: str) -> bool:
        return _is_taken(path, source.patterns) and (name != BASE or safety.is_model_file(path))

    def check(folder: Path) -> None:
        if name == BASE:
            safety.refuse_unsafe(folder, name)

    files, others = hub.list_files(source.uri, is_wanted, check)
    is_model = name == BASE
    left_out = tuple(path for path in others if is_model and globs.matches_any(path, patterns, with_hidden=True))
    unmatched = [path for path in others if path not in left_out]
    if is_model:
        safety.refuse_only_pickles((f.path for f in files), left_out, name)
    if not files:
        reason = explain_no_match(unmatched, patterns) if unmatched else ""
        raise UsageError(f"{source.uri}: has no files that match {', '.join(source.patterns)}{reason}")
    pins = tuple(PinnedFile(path=f.path, size_bytes=f.size_bytes, pin=f"sha256:{f.sha256}") for f in files)
    return source.model_copy(
        update={
            "files": (*source.files, *pins),
            "left_out": left_out,
            "unmatched": group_unmatched(unmatched, patterns),
        }
    )
