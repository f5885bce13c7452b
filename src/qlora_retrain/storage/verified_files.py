"""Read one file of an artifact or a version as a whole, checked against its manifest before anybody sees it."""

from __future__ import annotations

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import NotFound, Store

# A report has some hundred KiB. Whoever serves pages has several of these in memory at once.
MAX_FILE_BYTES = 16 * 1024**2


def find_file(files: tuple[File, ...], path: str) -> File | None:
    """Return the file of that path, or None."""
    return next((file for file in files if file.path == path), None)


def read_verified(store: Store, folder: str, file: File) -> bytes:
    """Return the bytes of a file below a folder of the store.

    Raises:
        IntegrityError: If it is missing, or has another hash than its manifest says.
        UsageError: If it is too large to be shown.
    """
    place = f"{store.uri}/{folder}/{file.path}"
    if file.size_bytes > MAX_FILE_BYTES:
        raise UsageError(
            f"{place}: has {file.size_bytes:,} bytes, and at most {MAX_FILE_BYTES:,} are shown; read it in the store"
        )
    try:
        # One byte more than there should be: a longer file then has another hash.
        data = store.read_start(f"{folder}/{file.path}", file.size_bytes + 1)
    except NotFound:
        raise IntegrityError(f"{place}: is missing, and its manifest names it") from None
    if hashing.sha256_bytes(data) != file.sha256:
        raise IntegrityError(f"{place}: its sha256 differs from its manifest's")
    return data
