"""A file that is shown to somebody is the one that its manifest names, and no larger than a page may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import verified_files
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import Store


def file_of(data: bytes, path: str = "report.html", size_bytes: int | None = None) -> File:
    return File(
        path=path, size_bytes=len(data) if size_bytes is None else size_bytes, sha256=hashing.sha256_bytes(data)
    )


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> str:
    (tmp_path / "report.html").write_bytes(b"<p>good</p>")
    store.upload(tmp_path, "a", ["report.html"])
    return "a"


def test_the_named_bytes_are_returned(store: Store, folder: str) -> None:
    assert verified_files.read_verified(store, folder, file_of(b"<p>good</p>")) == b"<p>good</p>"


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        (file_of(b"<p>gone</p>"), "sha256 differs"),
        (file_of(b"<p>good"), "sha256 differs"),
        (file_of(b"", "none.html"), "is missing"),
    ],
)
def test_anything_else_is_refused(store: Store, folder: str, file: File, fault: str) -> None:
    with pytest.raises(IntegrityError, match=fault):
        verified_files.read_verified(store, folder, file)


def test_a_manifest_names_nothing_outside_of_its_folder(store: Store, folder: str) -> None:
    with pytest.raises(UsageError, match="not a path in a store"):
        verified_files.read_verified(store, folder, file_of(b"", "../a/report.html"))


def test_a_file_that_is_too_large_for_a_page_is_not_read(store: Store, folder: str) -> None:
    with pytest.raises(UsageError, match="at most"):
        verified_files.read_verified(store, folder, file_of(b"", size_bytes=verified_files.MAX_FILE_BYTES + 1))
