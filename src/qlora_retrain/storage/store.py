"""Where artifacts live: one small interface, two backends, one contract (`tests/store`).

Paths are relative to the store's root, with `/`, without `..`. Everything that decides something (a manifest, an
alias, a plan) goes through `write_if_absent` or `swap`; everything else is written before the thing that names it.

Besides the three exceptions below, methods raise `UsageError` (a path that is not allowed, no permission, no bucket)
and `TryAgain` (disk full, throttled, no connection), never an exception of the library underneath.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_retrain.core.errors import UsageError

# The local backend's temporary files and lock begin with this; no stored name may, in either backend.
RESERVED = ".store-"


class NotFound(Exception):
    """There is nothing at that path."""


class Exists(Exception):
    """`write_if_absent` found something else there; `stored` is what it found."""

    def __init__(self, path: str, stored: Stored) -> None:
        super().__init__(path)
        self.stored = stored


class Conflict(Exception):
    """`swap` found another state than the one expected.

    After a lost answer it can also mean that our document was written and has been replaced since: read again.
    """


@dataclass(frozen=True, slots=True)
class Stored:
    """A small document with the tag of the state it was read in."""

    data: bytes
    tag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed file; `tag` changes with its content, and is empty where only reading the file could tell."""

    path: str
    size_bytes: int
    tag: str = ""


class Store(Protocol):
    """What every backend can do. Folders are not stored: one exists while there is a file below it."""

    uri: str

    def read(self, path: str) -> Stored:
        """The document at `path`; raises `NotFound`."""
        ...

    def write_if_absent(self, path: str, data: bytes) -> str:
        """Write a new document and return its tag; writing the same bytes again is no error; raises `Exists`."""
        ...

    def swap(self, path: str, data: bytes, expected: str | None) -> str:
        """Replace the document whose tag is `expected` (None: there is none); return the new tag; raises `Conflict`.

        Where `data` is there already, whatever `expected` says, it was written by an attempt whose answer was lost:
        no error. So a document must hold something unique (an id, a generation).
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every file below the folder `prefix`, sorted by path."""
        ...

    def children(self, prefix: str) -> Iterator[str]:
        """The names directly below the folder `prefix`, files and folders, sorted."""
        ...

    def upload(self, folder: Path, prefix: str, paths: Iterable[str]) -> None:
        """Copy `folder/<path>` to `prefix/<path>` for each path, in parallel; no half-written file becomes visible.

        Overwrites. A file missing in `folder` is the caller's bug: `FileNotFoundError`.
        """
        ...

    def download(self, prefix: str, paths: Iterable[str], folder: Path) -> None:
        """Copy `prefix/<path>` to `folder/<path>` for each path, in parallel; raises `NotFound`."""
        ...

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copy each (source, target) inside the store, without the bytes passing through this machine on S3.

        Overwrites; raises `NotFound`.
        """
        ...

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files; what is not there is no error."""
        ...

    def probe(self) -> None:
        """Check that conditional writes are honoured here; raises `UsageError` where they are not."""
        ...


def checked(path: str) -> str:
    """The path itself, if it may name a file of a store.

    Raises:
        UsageError: If it is empty or absolute, or has an empty, `.`, `..`, reserved or unprintable part.
    """
    for part in path.split("/"):
        if part in ("", ".", "..") or part.startswith(RESERVED) or not part.isprintable():
            raise UsageError(
                f"{path!r}: not a path in a store; wanted names joined by /, none of them empty, '.', '..', "
                f"unprintable or beginning with {RESERVED!r}"
            )
    return path


def joined(prefix: str, path: str) -> str:
    """`prefix/path`, checked; an empty prefix is the root."""
    return checked(f"{prefix}/{path}" if prefix else path)


def probe(store: Store) -> None:
    """Write below `.probe/` what a store without conditional writes would let through; `Store.probe` of both backends.

    Raises:
        UsageError: If it let it through.
    """
    path = f".probe/{uuid.uuid4().hex}"
    try:
        first = store.write_if_absent(path, b"first")
        with contextlib.suppress(Exists):
            store.write_if_absent(path, b"second")
            raise _unconditional(store, "overwrote a document that was to be written only if absent")
        store.swap(path, b"third", first)
        with contextlib.suppress(Conflict):
            store.swap(path, b"fourth", first)
            raise _unconditional(store, "replaced a document that was no longer the expected one")
    finally:
        store.delete([path])


def _unconditional(store: Store, what: str) -> UsageError:
    return UsageError(
        f"{store.uri}: this server ignores conditional writes: it {what}. Two runs could then overwrite each other's "
        "work unseen; use a server that honours If-Match and If-None-Match, or a folder"
    )
