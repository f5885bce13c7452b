"""The bucket: what each role may do in it, object by object, and what becomes of objects by themselves."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import pytest

from tests.manifests.overlays import ROOT, Document


def policy(role: str) -> list[Document]:
    statements: list[Document] = json.loads((ROOT / "bucket" / f"{role}-policy.json").read_text())["Statement"]
    return statements


def may(role: str, action: str, key: str) -> bool:
    """What IAM says of an action on an object: allowed by a statement, denied by none; `*` stands for slashes too."""

    def matches(patterns: str | list[str], text: str) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))

    resource = f"arn:aws:s3:::my-bucket/{key}"
    said = {
        statement["Effect"]
        for statement in policy(role)
        if matches(statement["Action"], action) and matches(statement["Resource"], resource)
    }
    return said == {"Allow"}


CHANGES = ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")


@pytest.mark.parametrize(
    ("key", "writers"),
    [
        ("qlora/models/tickets/versions/20260131T030000Z-0123456789ab/manifest.json", {"publish"}),
        ("qlora/models/tickets/versions/20260131T030000Z-0123456789ab/model/model.safetensors", {"publish"}),
        ("qlora/models/tickets/aliases/production.json", {"publish"}),
        ("qlora/models/tickets/audit/00000001-production-0123.json", {"publish"}),
        ("qlora/artifacts/adapter/0123/a/adapter.safetensors", {"step", "publish"}),
        ("qlora/scratch/train_qlora/0123/a/checkpoint-1/state.pt", {"step", "publish"}),
        ("qlora/runs/20260131T030000Z-0123456789ab/plan.json", {"airflow", "step", "publish"}),
        ("qlora/modelsx/tickets", set()),
        ("other/models/tickets/aliases/production.json", set()),
    ],
)
def test_each_role_changes_what_it_makes_and_only_the_publisher_versions(key: str, writers: set[str]) -> None:
    for action in CHANGES:
        assert {role for role in ("airflow", "step", "publish") if may(role, action, key)} == writers
    for role in ("airflow", "step", "publish"):
        assert may(role, "s3:GetObject", key) is key.startswith("qlora/")


def test_no_role_has_an_action_that_is_not_named() -> None:
    reads = {"s3:GetObject", "s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:ListMultipartUploadParts"}
    for role in ("airflow", "step", "publish"):
        actions = {a for s in policy(role) for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}
        assert actions == {*reads, *CHANGES}
        assert not any({"NotAction", "NotResource", "NotPrincipal"} & set(s) for s in policy(role))


def test_the_buckets_lifecycle_is_one_that_s3_takes_and_touches_no_version() -> None:
    import boto3
    from moto.server import ThreadedMotoServer  # not mock_aws: it empties every server of this process

    rules = json.loads((ROOT / "bucket" / "lifecycle.json").read_text())
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        at = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        account = {"region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
        s3 = boto3.client("s3", endpoint_url=at, **account)
        s3.create_bucket(Bucket="lifecycle")
        s3.put_bucket_lifecycle_configuration(Bucket="lifecycle", LifecycleConfiguration=rules)
        kept = s3.get_bucket_lifecycle_configuration(Bucket="lifecycle")["Rules"]
        s3.close()
    finally:
        server.stop()
    assert len(kept) == len(rules["Rules"])
    expiring = [rule["Filter"]["Prefix"] for rule in kept if "Expiration" in rule]
    assert expiring == ["qlora/scratch/"]
    assert any("AbortIncompleteMultipartUpload" in rule for rule in kept)
