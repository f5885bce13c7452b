"""A listing says whether the files of a source changed: those that a plan would take, without reading them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.storage.source_listing import SourceLister, SourceListing

STORE = "file:///a/store/elsewhere"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "old").mkdir(parents=True)
    (folder / "a.jsonl").write_text("1\n")
    (folder / "old" / "b.jsonl").write_text("22\n")
    (folder / "notes.txt").write_text("not data\n")
    return folder


def listed(folder: Path, *patterns: str, root: str = STORE) -> SourceListing:
    return SourceLister(folder.as_uri(), patterns or ("**/*.jsonl",)).list(SourceAccess(), root)


def add(folder: Path) -> None:
    (folder / "c.jsonl").write_text("3\n")


def grow(folder: Path) -> None:
    (folder / "a.jsonl").write_text("1\n2\n")


def replace_with_as_many_bytes(folder: Path) -> None:
    """As `cp -p` does: another content under the old time."""
    before = (folder / "a.jsonl").stat()
    (folder / "a.jsonl").write_text("9\n")
    os.utime(folder / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    # The clock of many kernels' file systems moves on by milliseconds only.
    while (folder / "a.jsonl").stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(folder / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))


def rename(folder: Path) -> None:
    (folder / "a.jsonl").rename(folder / "z.jsonl")


def remove(folder: Path) -> None:
    (folder / "old" / "b.jsonl").unlink()


@pytest.mark.parametrize("change", [add, grow, replace_with_as_many_bytes, rename, remove])
def test_each_change_of_a_file_is_another_listing(data: Path, change: Callable[[Path], None]) -> None:
    before = listed(data)
    assert (before.num_files, before.size_bytes) == (2, 5)
    assert listed(data) == before
    change(data)
    assert listed(data).digest != before.digest


def test_a_file_that_no_pattern_takes_changes_nothing(data: Path) -> None:
    before = listed(data)
    (data / "notes.txt").write_text("other notes\n")
    (data / "new.csv").write_text("a,b\n")
    assert listed(data) == before


def test_a_source_that_is_one_file_is_listed_alone(data: Path) -> None:
    before = listed(data / "a.jsonl", "**")
    assert (before.num_files, before.size_bytes) == (1, 2)
    add(data)
    assert listed(data / "a.jsonl", "**") == before
    grow(data)
    assert listed(data / "a.jsonl", "**") != before


@pytest.mark.parametrize("name", ["ü{1}[2].jsonl", "'; rm -rf ~ #.jsonl", "<script>.jsonl", "100%41.jsonl"])
def test_a_strange_name_is_a_name(data: Path, name: str) -> None:
    (data / name).write_text("1\n")
    assert listed(data).num_files == 3
    assert listed(data / name, "**").num_files == 1


@pytest.mark.parametrize("name", [b"a\xff.jsonl", b"line\nbreak.jsonl", "\u202efdp.jsonl".encode()])
def test_a_name_that_cannot_be_shown_is_refused_as_by_a_plan(data: Path, name: bytes) -> None:
    Path(os.fsdecode(os.path.join(os.fsencode(data), name))).write_bytes(b"1\n")  # noqa: PTH118 - a path of bytes
    with pytest.raises(UsageError, match="unprintable"):
        listed(data)


def test_what_a_plan_would_refuse_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        listed(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"has no files that match \*\.csv"):
        listed(data, "*.csv")
    secret = tmp_path / "secret"
    secret.write_text("key\n")
    (data / "link.jsonl").symlink_to(secret)
    limits = SourceAccess((f"{data.as_uri()}/",), (), "platform.yaml")
    with pytest.raises(UsageError, match=r"link\.jsonl"):
        SourceLister(data.as_uri(), ["**/*.jsonl"]).list(limits, STORE)
    (data / "link.jsonl").unlink()
    os.mkfifo(data / "pipe.jsonl")
    with pytest.raises(UsageError, match="found a pipe"):
        listed(data)


def test_a_store_inside_the_data_would_start_run_after_run(data: Path) -> None:
    (data / "store" / "runs").mkdir(parents=True)
    (data / "store" / "runs" / "log.jsonl").write_text("x\n")
    with pytest.raises(UsageError, match="keep data and store apart"):
        listed(data, root=(data / "store").as_uri())
    assert listed(data, "*.jsonl", root=(data / "store").as_uri()).num_files == 1


def test_objects_of_a_bucket_are_listed(s3_server: str) -> None:
    client, prefix = boto3.session.Session().client("s3"), uuid.uuid4().hex

    def put(name: str, body: bytes) -> None:
        client.put_object(Bucket="retraining", Key=f"{prefix}/{name}", Body=body)

    lister = SourceLister(f"s3://retraining/{prefix}", ["**/*.jsonl"])

    def listing(root: str = "s3://retraining/elsewhere") -> SourceListing:
        return lister.list(SourceAccess(), root)

    with pytest.raises(UsageError, match="has no files"):
        listing()
    put("a.jsonl", b"1\n")
    put("below/b ü'.jsonl", b"22\n")
    put("notes.txt", b"no data")
    before = listing()
    assert (before.num_files, before.size_bytes) == (2, 5)
    put("notes.txt", b"other notes")
    assert listing() == before
    put("a.jsonl", b"9\n")  # as many bytes
    changed = listing()
    assert changed.digest != before.digest
    client.delete_object(Bucket="retraining", Key=f"{prefix}/a.jsonl")
    assert listing().digest not in (before.digest, changed.digest)
    with pytest.raises(UsageError, match="keep data and store apart"):
        listing(root=f"s3://retraining/{prefix}/below")
    with pytest.raises(UsageError, match="no-such-bucket"):
        SourceLister("s3://no-such-bucket/x", ["**"]).list(SourceAccess(), "s3://retraining/elsewhere")
    client.close()
