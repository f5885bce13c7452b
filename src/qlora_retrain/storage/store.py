"""Where artifacts live: one small interface, two backends, one contract (`tests/storage/test_store_contract.py`).

Paths are relative to the store's root, with `/`, without `..`. Every document that decides something (a manifest, an
alias, a plan) is written with `write_if_absent` or `swap`. All else is written before the document that names it.

Methods raise the three exceptions below, `UsageError` (a path that is not allowed, no permission, no bucket) and
`TryAgain` (disk full, throttled, no connection). They never raise an exception of the library underneath.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from qlora_retrain.core.errors import IntegrityError, UsageError

# Names of the local backend's temporary files and lock begin with this; no stored name may, in either backend.
RESERVED_PREFIX = ".store-"
# The largest document: larger than any that this project writes, and than a tokenizer's file. Somebody else may have
# written it, and it is in memory as a whole.
MAX_DOCUMENT_BYTES = 128 * 1024**2
# For whoever reads that a server does not honour conditions. In a bucket with versions it overwrites under
# If-None-Match and refuses every ETag; what was written then cannot be swapped after versioning is suspended either.
CEPH_HINT = "(Ceph 16 does so only in a bucket that never had versioning or object lock)"


class NotFound(Exception):
    """There is no document at that path."""


class AlreadyExists(Exception):
    """`write_if_absent` found another document at the path; `stored` is that document."""

    def __init__(self, path: str, stored: Document) -> None:
        super().__init__(path)
        self.stored = stored


class Conflict(Exception):
    """`swap` found another state than the expected one.

    After a lost answer it can also mean that our document was written and has been replaced since. Read it again.
    """


@dataclass(frozen=True, slots=True)
class Document:
    """A small document, with the tag of the state in which it was read."""

    data: bytes
    tag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed file.

    Attributes:
        path: Its path in the store.
        size_bytes: Its size.
        tag: It changes with the content; empty where the backend would have to read the file.
        modified_at: When it was written, in seconds since 1970 by the store's clock. A copy may have its source's time.
    """

    path: str
    size_bytes: int
    tag: str = ""
    # Where nobody knows, a file is as good as new: what is old is removed.
    modified_at: float = math.inf


class Store(Protocol):
    """The operations of every backend. Folders are not stored: a folder exists while there is a file below it."""

    uri: str

    def read(self, path: str) -> Document:
        """Return the document at `path`; raise `NotFound` where there is none, `IntegrityError` if it is too large."""
        ...

    def read_start(self, path: str, size_bytes: int) -> bytes:
        """Return the first bytes of a file, fewer where it is shorter; raise `NotFound` where there is none."""
        ...

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        """Return the bytes of a file from `start` on, fewer where it ends; raise `NotFound` where there is none."""
        ...

    def sha256(self, path: str) -> str:
        """Return the hash of a file's bytes, read anew; raise `NotFound` where there is none."""
        ...

    def write_if_absent(self, path: str, data: bytes) -> str:
        """Write a new document and return its tag; raise `AlreadyExists` where there is another one.

        Writing the same bytes again is no error: it is how a caller repeats a write whose answer was lost.
        """
        ...

    def swap(self, path: str, data: bytes, expected: str | None) -> str:
        """Replace the document whose tag is `expected` (None: there is none) and return the new tag.

        Raise `Conflict` where the document has another tag. If `data` is there already, whatever `expected` says, an
        attempt whose answer was lost wrote it, and that is no error. So a document must hold something unique, such as
        an id or a generation.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Return every file below the folder `prefix`, sorted by path."""
        ...

    def children(self, prefix: str) -> Iterator[str]:
        """Return the names of the files and folders directly below the folder `prefix`, sorted.

        Those that no path may have are left out: nobody could read what is there.
        """
        ...

    def upload(self, folder: Path, prefix: str, paths: Iterable[str]) -> None:
        """Copy `folder/<path>` to `prefix/<path>` for each path, in parallel; no half-written file becomes visible.

        Existing files are overwritten. A file missing in `folder` is the caller's bug: `FileNotFoundError`.
        """
        ...

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Copy `prefix/<path>` to `folder/<path>` for each path, in parallel; raise `NotFound` for a missing one."""
        ...

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copy each (source, target) inside the store; on S3 the bytes do not pass through this machine.

        Existing files are overwritten. Raise `NotFound` for a source that is missing.
        """
        ...

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files; a file that is not there is no error."""
        ...

    def probe(self) -> None:
        """Check that the server honours conditional writes; raise `UsageError` where it does not."""
        ...


def validate_path(path: str) -> str:
    """Return the path, if it may name a file of a store.

    Raises:
        UsageError: If it is empty or absolute, or has an empty, `.`, `..`, reserved or unprintable part.
    """
    # What one backend cannot store, the other refuses too: a store may be copied from a folder to S3 and back.
    for part in path.split("/"):
        if part in ("", ".", "..") or part.startswith(RESERVED_PREFIX) or not part.isprintable():
            raise UsageError(
                f"{path!r}: not a path in a store; expected names joined by /, none of them empty, '.', '..', "
                f"unprintable or beginning with {RESERVED_PREFIX!r}"
            )
    return path


def is_valid_path(path: str) -> bool:
    """Return whether a path may name a file of a store; what others put there can have any name."""
    try:
        validate_path(path)
    except UsageError:
        return False
    return True


def join_path(prefix: str, path: str) -> str:
    """Return `prefix/path`, validated; an empty prefix is the root."""
    return validate_path(f"{prefix}/{path}" if prefix else path)


def root_option(store: Store) -> str:
    """Return the option that names a store in a command that is printed, to be copied into a shell."""
    return f"--root {shlex.quote(store.uri)}"


def read_bounded(file: IO[bytes], place: str) -> bytes:
    """Return all bytes of a document.

    Raises:
        IntegrityError: If there are more than `MAX_DOCUMENT_BYTES`.
    """
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    # A connection that breaks off shows only in the read behind what has arrived.
    while len(data) <= MAX_DOCUMENT_BYTES and (chunk := file.read(MAX_DOCUMENT_BYTES + 1 - len(data))):
        data += chunk
    if len(data) > MAX_DOCUMENT_BYTES:
        raise IntegrityError(
            f"{place}: expected a document of at most {MAX_DOCUMENT_BYTES // 2**20} MiB, found more; this project "
            "wrote no such document"
        )
    return data


def probe(store: Store) -> None:
    """Try two writes below `.probe/` that a store must refuse; `Store.probe` of both backends.

    Raises:
        UsageError: If the store accepts one of them.
    """
    # A new name for each probe, since several plans may be made at once.
    path = f".probe/{uuid.uuid4().hex}"
    try:
        _try_writes(store, path)
    except BaseException:
        # What it found is what counts, and a clean-up that fails too must not take its place.
        with contextlib.suppress(Exception):
            store.delete([path])
        raise
    store.delete([path])


def _try_writes(store: Store, path: str) -> None:
    first = store.write_if_absent(path, b"first")
    with contextlib.suppress(AlreadyExists):
        store.write_if_absent(path, b"second")
        raise _unconditional(store, "overwrote a document that was to be written only if absent")

    store.swap(path, b"third", first)
    with contextlib.suppress(Conflict):
        store.swap(path, b"fourth", first)
        raise _unconditional(store, "replaced a document that was no longer the expected one")


def _unconditional(store: Store, fault: str) -> UsageError:
    return UsageError(
        f"{store.uri}: this server ignores conditional writes: it {fault}. Two runs could then overwrite each other's "
        f"work unseen; use a server that honours If-Match and If-None-Match {CEPH_HINT}, or a folder"
    )
