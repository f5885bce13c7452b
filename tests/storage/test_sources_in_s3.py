"""Sources in S3: pinned by ETag, so a changed object is a changed source."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import open_store, sources


@pytest.fixture
def bucket_folder(s3_uri: str, tmp_path: Path) -> str:
    put(s3_uri, tmp_path, "{}")
    return s3_uri


def put(uri: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "up").mkdir(exist_ok=True)
    (tmp_path / "up" / "rows.jsonl").write_text(text)
    open_store(uri).upload(tmp_path / "up", "", ["rows.jsonl"])


def test_an_object_of_the_same_size_with_other_bytes_has_another_key(bucket_folder: str, tmp_path: Path) -> None:
    before = sources.pin("raw_data", bucket_folder, ["**"])
    put(bucket_folder, tmp_path, "[]")
    after = sources.pin("raw_data", bucket_folder, ["**"])
    assert before.files[0].size_bytes == after.files[0].size_bytes
    assert before.key() != after.key()


def test_an_object_that_changed_since_the_plan_is_refused(bucket_folder: str, tmp_path: Path) -> None:
    pinned = sources.pin("raw_data", bucket_folder, ["**"])
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{}"
    put(bucket_folder, tmp_path, "[]")
    with pytest.raises(IntegrityError, match="plan again"):
        sources.fetch(pinned, tmp_path / "out")


def test_an_object_given_as_a_folder_is_told_how_to_be_named(bucket_folder: str) -> None:
    with pytest.raises(UsageError, match="give its folder as uri and its name in files"):
        sources.pin("raw_data", f"{bucket_folder}/rows.jsonl", ["**"])
