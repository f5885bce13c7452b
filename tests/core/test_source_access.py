"""Prefixes of sources: compared part by part, in one form, whatever a URI is written like."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.core.source_access import SourceAccess, canonical

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ACCESS = SourceAccess(("file:///srv/data/", "s3://bucket/team/", "s3://whole", "hf://org/", "hf://other/model"))


@pytest.mark.parametrize(
    "uri",
    [
        "file:///srv/data",
        "file:///srv/data/a/b.jsonl",
        "file://localhost/srv/data/a",
        "FILE:///srv/data/a",
        "file:////srv//data/a",
        "file:///srv/%64ata/a",
        "s3://bucket/team",
        "S3://bucket/team/x/",
        "s3://bucket/team/100%25",
        "s3://whole",
        "s3://whole/x",
        f"hf://org/model@{COMMIT}",
        f"hf://other/model@{COMMIT}",
    ],
)
def test_what_lies_below_a_prefix_is_allowed(uri: str) -> None:
    assert ACCESS.refusal(uri) is None
    assert ACCESS.refusal(canonical(uri)) is None


@pytest.mark.parametrize(
    "uri",
    [
        "file:///",
        "file:///srv",
        "file:///srv/database/a",
        "file:///srv/data/../../etc/shadow",
        "file:///srv/data/%2e%2e/%2E%2E/etc/shadow",
        "file:///srv/data/..%2f..%2fetc/shadow",
        "file:///SRV/data/a",
        "file://evil/srv/data/a",
        "file:/srv/../etc",
        "file:srv/data",
        "file:///srv/data/\x00",
        "file:///srv/data/%00",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/teammate/x",
        "s3://bucket-evil/team/x",
        "s3://BUCKET/team/x",
        "s3://bucket/Team/x",
        "s3://bucket/team/../other",
        "s3://bucket/team/%2e%2e/other",
        "s3://bucket/team%2fx",
        "s3://bucket//team/x",
        "s3://bucket/team//x",
        "s3://bucket/./team/x",
        "s3://whole.evil/x",
        "s3:///bucket/team",
        "s3://buck\net/team",
        f"hf://organisation/model@{COMMIT}",
        f"hf://other/model-2@{COMMIT}",
        f"hf://other/mod@{COMMIT}",
        f"hf://org/../evil/model@{COMMIT}",
        f"hf://ORG/model@{COMMIT}",
        "http://bucket/team",
        "/srv/data/a",
    ],
)
def test_what_only_looks_as_if_is_refused(uri: str) -> None:
    assert ACCESS.refusal(uri)


def test_the_longest_prefix_decides_about_the_stores_own_folders() -> None:
    closed = ("s3://b/q/artifacts", "s3://b/q/models")
    access = SourceAccess(("s3://b/", "s3://b/q/models/base/"), closed)
    assert access.refusal("s3://b/q/raw/x") is None
    assert "in one of the store's own folders" in str(access.refusal("s3://b/q/artifacts/dataset/0"))
    assert access.refusal("s3://b/q/models/other/versions/1")
    assert access.refusal("s3://b/q/models/base/versions/1") is None
    assert SourceAccess(("s3://b/q/models/",), closed).refusal("s3://b/q/models/x") is None
    assert SourceAccess(None, closed).refusal("s3://b/q/models/x") is None
    assert SourceAccess(()).refusal("s3://b/x")


def test_of_a_local_path_the_place_counts_that_its_links_lead_to(tmp_path: Path) -> None:
    real, root = tmp_path / "disk", tmp_path / "data"
    (real / "rows").mkdir(parents=True)
    root.symlink_to(real)
    (tmp_path / "here").symlink_to(real / "rows")
    (real / "away").symlink_to("/etc")
    access = SourceAccess((root.as_uri(),))
    assert access.refusal((root / "rows").as_uri()) is None
    assert access.refusal((real / "rows").as_uri()) is None
    assert access.refusal((tmp_path / "here").as_uri()) is None
    assert access.refusal((root / "away" / "shadow").as_uri())
    assert access.refusal(tmp_path.as_uri())
