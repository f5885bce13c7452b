"""The files of a commit on the Hugging Face Hub: listed by their sha256, and downloaded.

The Hub says the sha256 of every large file. The others are small; they are downloaded once and hashed. A commit never
changes, so the planner remembers the list (`planner_memory.py`). Where the Hub cannot be reached, the Hub client's own
cache is asked.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from qlora_retrain.core import hashing, uris
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.storage import hub_secrets, planner_memory
from qlora_retrain.storage.artifact import File

_Result = TypeVar("_Result")
# The client itself would wait for ever, e.g. behind a firewall that answers nothing.
_TIMEOUT_SECONDS = 20


class Unreachable(Exception):
    """The Hub tells nothing here: no network, no access, or no request may be made."""

    def __init__(self, uri: str, reason: object, problem: type[UsageError | TryAgain]) -> None:
        # An error of the client has the address, and that of a large file's download holds a signature.
        super().__init__(f"{uri}: cannot be reached: {uris.mask_secrets_of_errors(str(reason))}")
        self._problem = problem

    def as_problem(self) -> UsageError | TryAgain:
        """Return the error for a person: `UsageError` where a retry would end in the same way."""
        return self._problem(str(self))


@dataclass(frozen=True)
class _Entry:
    """A file as the Hub lists it, whose sha256 may not be known yet."""

    size_bytes: int
    sha256: str | None


def split(uri: str) -> tuple[str, str]:
    """Return the repository and the commit of `hf://owner/name@commit`."""
    repository, _, commit = uri.removeprefix("hf://").partition("@")
    return repository, commit


def list_files(
    uri: str, is_wanted: Callable[[str], bool], check: Callable[[Path], None]
) -> tuple[tuple[File, ...], tuple[str, ...]]:
    """Return the files of a commit that are wanted, and the names of all others.

    Args:
        uri: `hf://owner/name@commit`.
        is_wanted: Says of a path whether its hash is needed.
        check: Called with a folder of those small files that had to be downloaded.

    Raises:
        Unreachable: If neither the Hub nor a cache can tell.
        UsageError: If there is no such commit, no access to it, or the token cannot be sent.
    """
    memory = planner_memory.place("commit-files", uri)
    entries = _remembered(memory)
    if any(is_wanted(path) and entry.sha256 is None for path, entry in entries.items()) or not entries:
        try:
            entries = _from_hub(uri, is_wanted, check)
            text = {path: [entry.size_bytes, entry.sha256] for path, entry in entries.items()}
            planner_memory.write(memory, json.dumps(text))
        except Unreachable:
            # Never remembered: that cache may lack files.
            entries = _from_client_cache(uri, is_wanted)
            if not entries:
                raise

    files = [
        File(path=path, size_bytes=entry.size_bytes, sha256=entry.sha256)
        for path, entry in sorted(entries.items())
        if is_wanted(path) and entry.sha256
    ]
    return tuple(files), tuple(sorted(path for path in entries if not is_wanted(path)))


def download(uri: str, files: Iterable[File], folder: Path) -> None:
    """Put files of a commit into a folder; their bytes are not checked.

    Raises:
        UsageError: If there is no such commit, no access to it, or no request may be made.
        TryAgain: If the Hub cannot be reached.
    """
    paths = [file.path for file in files]
    try:
        _download(uri, paths, folder)
    except Unreachable as unreachable:
        snapshot = _snapshot(uri)
        if not all((snapshot / path).is_file() for path in paths):
            raise unreachable.as_problem() from unreachable
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / path, folder / path)


def _from_hub(uri: str, is_wanted: Callable[[str], bool], check: Callable[[Path], None]) -> dict[str, _Entry]:
    from huggingface_hub import HfApi

    repository, commit = split(uri)
    info = _request(
        uri,
        lambda: HfApi().model_info(repository, revision=commit, files_metadata=True, timeout=_TIMEOUT_SECONDS),
    )
    entries = {
        file.rfilename: _Entry(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or ()
    }
    small = [path for path, entry in entries.items() if is_wanted(path) and entry.sha256 is None]
    if small:
        with TemporaryDirectory(prefix="qlora-retrain-hub-") as scratch:
            folder = Path(scratch) / "files"
            folder.mkdir()
            _download(uri, small, folder)
            check(folder)
            entries |= {path: _entry_on_disk(folder / path) for path in small}
    return entries


def _download(uri: str, paths: Iterable[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

    repository, commit = split(uri)
    # The client takes globs.
    patterns = [glob.escape(path) for path in paths]
    _request(uri, lambda: snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=patterns))
    # The client's own notes: they hold times, and are no content of the commit.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _request(uri: str, call: Callable[[], _Result]) -> _Result:
    """Call the client, and map its errors to one of ours."""
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import errors

    hub_secrets.mask_log()
    try:
        return call()
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 500
        # Another machine may have the token that is missing here; the Hub hides what an account may not see.
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            raise Unreachable(uri, error, UsageError) from error
        if 400 <= status < 500 and status not in (408, 429):
            reason = uris.mask_secrets_of_errors(str(error))
            raise UsageError(f"{uri}: cannot be downloaded: {reason}") from error
        raise Unreachable(uri, error, TryAgain) from error
    except (errors.LocalEntryNotFoundError, ConnectionError, HTTPError, InvalidURL, UnicodeError) as error:
        if any(hub_secrets.is_unsendable(link) for link in (error, error.__cause__) if link):
            raise UsageError(f"{uri}: {hub_secrets.UNSENDABLE}") from None
        is_offline = isinstance(error.__cause__ or error, errors.OfflineModeIsEnabled)
        raise Unreachable(uri, error, UsageError if is_offline else TryAgain) from error


def _from_client_cache(uri: str, is_wanted: Callable[[str], bool]) -> dict[str, _Entry]:
    """Return what the Hub client has of the commit on this machine."""
    snapshot = _snapshot(uri)
    paths = {p.relative_to(snapshot).as_posix(): p for p in snapshot.rglob("*") if p.is_file()}
    return {
        name: _entry_on_disk(path) if is_wanted(name) else _Entry(path.stat().st_size, None)
        for name, path in paths.items()
    }


def _snapshot(uri: str) -> Path:
    from huggingface_hub import constants

    repository, commit = split(uri)
    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots" / commit


def _entry_on_disk(path: Path) -> _Entry:
    return _Entry(path.stat().st_size, hashing.sha256_file(path))


def _remembered(memory: Path | None) -> Mapping[str, _Entry]:
    text = planner_memory.read(memory)
    try:
        return {path: _Entry(*entry) for path, entry in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}
