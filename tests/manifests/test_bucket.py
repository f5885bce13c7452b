"""The bucket: who has each role, what it may do with each object, and which objects expire."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from tests.manifests.overlays import OVERLAYS, ROOT, Document, documents_of_kind


def policy(role: str) -> list[Document]:
    statements: list[Document] = json.loads((ROOT / "bucket" / f"{role}-policy.json").read_text())["Statement"]
    return statements


def is_allowed(role: str, action: str, key: str) -> bool:
    """Evaluate a role's policy as IAM does: a statement allows it and none denies it; `*` matches slashes too."""

    def matches(patterns: str | list[str], text: str) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))

    resource = f"arn:aws:s3:::my-bucket/{key}"
    effects = {
        statement["Effect"]
        for statement in policy(role)
        if matches(statement["Action"], action) and matches(statement["Resource"], resource)
    }
    return effects == {"Allow"}


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
        assert {role for role in ("airflow", "step", "publish") if is_allowed(role, action, key)} == writers
    for role in ("airflow", "step", "publish"):
        assert is_allowed(role, "s3:GetObject", key) is key.startswith("qlora/")


def test_no_role_has_an_action_that_is_not_named() -> None:
    reads = {"s3:GetObject", "s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:ListMultipartUploadParts"}
    for role in ("airflow", "step", "publish"):
        actions = {a for s in policy(role) for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}
        assert actions == {*reads, *CHANGES}
        assert not any({"NotAction", "NotResource", "NotPrincipal"} & set(s) for s in policy(role))


ROLE_ANNOTATION = "eks.amazonaws.com/role-arn"
# A program in the place of the `aws` command: it answers the two lookups and records every other call.
AWS = """#!/usr/bin/env python3
import json, os, sys
answers = {"eks": "https://oidc.example/id/CAFE", "sts": "444455556666"}
if sys.argv[1] in answers:
    print(answers[sys.argv[1]])
else:
    with open(os.environ["AWS_CALLS"], "a") as stream:
        print(json.dumps(sys.argv[2:]), file=stream)
"""


def test_each_role_is_that_of_the_accounts_that_name_it_and_of_nobody_else() -> None:
    """The accounts are those of the overlays, and those of Airflow's chart.

    The chart names an account `<release>-<component>`, in the release's namespace.
    """
    subjects_by_role: dict[str, set[str]] = {}
    for account in (account for overlay in OVERLAYS for account in documents_of_kind(overlay, "ServiceAccount")):
        if role := account["metadata"].get("annotations", {}).get(ROLE_ANNOTATION):
            subject = f"system:serviceaccount:{account['metadata']['namespace']}:{account['metadata']['name']}"
            subjects_by_role.setdefault(role, set()).add(subject)

    values = yaml.safe_load((ROOT / "airflow" / "values.yaml").read_text())
    for component in (name for name, value in values.items() if isinstance(value, dict)):
        if role := values[component].get("serviceAccount", {}).get("annotations", {}).get(ROLE_ANNOTATION):
            subjects_by_role.setdefault(role, set()).add(f"system:serviceaccount:airflow:airflow-{component}")

    assert len(subjects_by_role) == 3
    for role, subjects in subjects_by_role.items():
        owner, _, name = role.partition(":role/qlora-retrain-")
        (statement,) = json.loads((ROOT / "bucket" / f"{name}-trust.json").read_text())["Statement"]
        provider_account, _, provider = statement["Principal"]["Federated"].partition(":oidc-provider/")
        trusted_subject = statement["Condition"]["StringEquals"].pop(f"{provider}:sub")
        assert {trusted_subject} == subjects
        assert provider_account == owner
        assert statement == {
            "Effect": "Allow",
            "Principal": {"Federated": f"{owner}:oidc-provider/{provider}"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {"StringEquals": {f"{provider}:aud": "sts.amazonaws.com"}},
        }


@pytest.fixture
def aws() -> Iterator[Callable[[str], Any]]:
    """Start an AWS on loopback; make a client of one of its services."""
    from moto.server import ThreadedMotoServer  # not mock_aws: it empties every server of this process

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint_url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    account = {"region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
    clients: list[Any] = []

    def make_client(service: str) -> Any:
        clients.append(boto3.client(service, endpoint_url=endpoint_url, **account))
        return clients[-1]

    yield make_client
    for client in clients:
        client.close()
    server.stop()


def test_the_roles_are_made_by_the_commands_of_the_page_with_a_cluster_and_an_account_of_ones_own(
    aws: Callable[[str], Any], tmp_path: Path
) -> None:
    """Run the page's own commands in a copy of the manifests; then send the recorded calls to a local IAM."""
    page = (ROOT.parent / "docs" / "deploy.md").read_text()
    (script,) = [block for block in re.findall(r"```\n(.*?)```", page, re.DOTALL) if "create-role" in block]
    shutil.copytree(ROOT, tmp_path / "manifests")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "aws").write_text(AWS)
    (tmp_path / "bin" / "aws").chmod(0o755)
    iam = aws("iam")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "AWS_CALLS": str(tmp_path / "calls")}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True)

    for text in (tmp_path / "calls").read_text().splitlines():
        operation, *options = json.loads(text)
        values = [(tmp_path / v.removeprefix("file://")).read_text() if v.startswith("file://") else v for v in options]
        keys = ["".join(word.title() for word in key.removeprefix("--").split("-")) for key in values[::2]]
        getattr(iam, operation.replace("-", "_"))(**dict(zip(keys, values[1::2], strict=True)))

    for name in ("airflow", "step", "publish"):
        role = iam.get_role(RoleName=f"qlora-retrain-{name}")["Role"]
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert statement["Principal"]["Federated"] == "arn:aws:iam::444455556666:oidc-provider/oidc.example/id/CAFE"
        assert set(statement["Condition"]["StringEquals"]) == {"oidc.example/id/CAFE:sub", "oidc.example/id/CAFE:aud"}
        assert iam.get_role_policy(RoleName=role["RoleName"], PolicyName="store")["PolicyDocument"] == json.loads(
            (ROOT / "bucket" / f"{name}-policy.json").read_text()
        )
    for file in ("overlays/production/roles.yaml", "airflow/values.yaml"):
        assert "arn:aws:iam::444455556666:role/" in (tmp_path / "manifests" / file).read_text()


def test_the_buckets_lifecycle_is_one_that_s3_takes_and_touches_no_version(aws: Callable[[str], Any]) -> None:
    rules = json.loads((ROOT / "bucket" / "lifecycle.json").read_text())
    s3 = aws("s3")
    s3.create_bucket(Bucket="lifecycle")
    s3.put_bucket_lifecycle_configuration(Bucket="lifecycle", LifecycleConfiguration=rules)
    rules_in_s3 = s3.get_bucket_lifecycle_configuration(Bucket="lifecycle")["Rules"]
    assert len(rules_in_s3) == len(rules["Rules"])
    expiring = [rule["Filter"]["Prefix"] for rule in rules_in_s3 if "Expiration" in rule]
    assert expiring == ["qlora/scratch/"]
    assert any("AbortIncompleteMultipartUpload" in rule for rule in rules_in_s3)
