"""List the files of a source by names, sizes and states, without reading them: what changed since the last look.

It takes the files that a plan would take, and refuses what a plan would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from qlora_retrain.core import hashing, local_files, uris
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.storage import globs, open_store
from qlora_retrain.storage.source_folder import SourceFolder
from qlora_retrain.storage.store import Store, validate_path

# Of each file its name, its size and a text that changes with its content.
States = list[tuple[str, int, str]]


@dataclass(frozen=True, slots=True)
class SourceListing:
    """The files of a source at one moment; `digest` is another one when any of them is new, gone or changed."""

    digest: str
    num_files: int
    size_bytes: int


class SourceLister:
    """List a source in a folder or in S3 again and again, with one connection.

    Args:
        uri: The source.
        patterns: Globs of the files that count.
    """

    def __init__(self, uri: str, patterns: Sequence[str]) -> None:
        self._uri, self._patterns = uri, patterns
        self._bucket: Store | None = None

    def list(self, access: SourceAccess, root: str) -> SourceListing:
        """List it once.

        Args:
            access: Where sources may lie.
            root: The store.

        Raises:
            UsageError: If it may not be read, has no such files, or a file of the store is one of them.
        """
        place = uris.mask_secrets(self._uri)
        if refusal := access.refusal(self._uri):
            raise UsageError(f"{place}: {refusal}")
        is_local = self._uri.startswith("file:")
        folder_uri, states = self._local_states(access) if is_local else (self._uri, self._s3_states())
        if not states:
            raise UsageError(f"{place}: has no files that match {', '.join(self._patterns)}")

        # Otherwise each run would change the data by its own logs, and so start the next one.
        prefix = f"{uris.absolute(root).rstrip('/')}/"
        if any(f"{folder_uri.rstrip('/')}/{quote(name)}".startswith(prefix) for name, _, _ in states):
            raise UsageError(
                f"{place}: the store {root} lies in it, and every run changes the store; keep data and store apart, or "
                "leave the store out with `files`"
            )
        return SourceListing(hashing.sha256_json(states), len(states), sum(size_bytes for _, size_bytes, _ in states))

    def _local_states(self, access: SourceAccess) -> tuple[str, States]:
        """Return the folder's URI, and its files; of a source that is one file, its folder with that file alone."""
        path = uris.local_path(self._uri)
        is_folder = _is_folder(path, access)
        location = path if is_folder else path.parent
        folder = SourceFolder(location, access)
        names = folder.paths(self._patterns)[0] if is_folder else [path.name]
        return location.as_uri(), [(name, *folder.size_and_times(name)) for name in names]

    def _s3_states(self) -> States:
        bucket, self._bucket = self._bucket or open_store(self._uri), None
        entries = [entry for entry in bucket.list("") if globs.matches_any(entry.path, self._patterns)]
        # Kept only where it works: after a fault a new one reads the credentials again.
        self._bucket = bucket
        return [(validate_path(entry.path), entry.size_bytes, entry.tag) for entry in entries]


def _is_folder(path: Path, access: SourceAccess) -> bool:
    try:
        return Path(local_files.resolve(path, access)).is_dir()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected a file or a folder") from None
