"""The bucket: who has each role, and which objects expire; `tests/pipeline/test_access.py` has what a role may do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from qlora_retrain.config.line import load
from qlora_retrain.config.sections import PublishConfig
from qlora_retrain.pipeline import access, policies
from tests.manifests.overlays import OVERLAYS, ROOT, documents_of_kind

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


def subjects_by_role() -> dict[str, set[str]]:
    """Return the accounts that name each role: those of the overlays, of Airflow's chart, and of messages.

    The chart names an account `<release>-<component>`, in the release's namespace.
    """
    subjects: dict[str, set[str]] = {}
    for account in (account for overlay in OVERLAYS for account in documents_of_kind(overlay, "ServiceAccount")):
        if role := account["metadata"].get("annotations", {}).get(ROLE_ANNOTATION):
            subject = f"system:serviceaccount:{account['metadata']['namespace']}:{account['metadata']['name']}"
            subjects.setdefault(role, set()).add(subject)

    values = yaml.safe_load((ROOT / "airflow" / "values.yaml").read_text())
    for component in (name for name, value in values.items() if isinstance(value, dict)):
        if role := values[component].get("serviceAccount", {}).get("annotations", {}).get(ROLE_ANNOTATION):
            subjects.setdefault(role, set()).add(f"system:serviceaccount:airflow:airflow-{component}")
    account = yaml.safe_load((ROOT / "airflow" / "messages.yaml").read_text())["metadata"]
    role = account["annotations"][ROLE_ANNOTATION]
    subjects[role] = {f"system:serviceaccount:{account['namespace']}:{account['name']}"}
    return subjects


def test_each_role_of_the_graph_is_that_of_one_account_and_publish_has_one_for_each_line() -> None:
    head = "arn:aws:iam::111122223333:role/qlora-retrain-"
    users = {role for role in access.roles("my-line") if role not in (access.GC, access.PULL)}
    assert {role.removeprefix(head) for role in subjects_by_role()} == users
    assert all(len(subjects) == 1 for subjects in subjects_by_role().values())


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


LINE = "line: my-line\nsources: {raw_data: 's3://data/tickets', base_model: 's3://data/base'}\n"


def run_script(page_command: str, folder: Path) -> list[list[str]]:
    """Run the block of docs/deploy.md that has a command, in a copy of the manifests; return the calls of `aws`."""
    page = (ROOT.parent / "docs" / "deploy.md").read_text()
    (script,) = [block for block in re.findall(r"```\n(.*?)```", page, re.DOTALL) if page_command in block]
    shutil.copytree(ROOT, folder / "manifests")
    for name in ("bin", "pipelines"):
        (folder / name).mkdir()
    (folder / "pipelines" / "my-line.yaml").write_text(LINE)
    own_command = f'#!/bin/sh\nexec {sys.executable} -m qlora_retrain.cli "$@"\n'
    for name, program in (("aws", AWS), ("qlora-retrain", own_command)):
        (folder / "bin" / name).write_text(program)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "AWS_CALLS": str(folder / "calls"),
        "PYTHONPATH": str(ROOT.parent / "src"),
    }
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True)
    return [json.loads(text) for text in (folder / "calls").read_text().splitlines()]


def call(client: Any, folder: Path, operation: str, options: list[str]) -> None:
    """Send a recorded call of the command line to a server."""
    values = [(folder / v.removeprefix("file://")).read_text() if v.startswith("file://") else v for v in options]
    keys = ["".join(word.title() for word in key.removeprefix("--").split("-")) for key in values[::2]]
    arguments: dict[str, Any] = dict(zip(keys, values[1::2], strict=True))
    for key, value in arguments.items():
        if key.endswith("Configuration"):  # JSON, or the short form `Name=Value`
            arguments[key] = json.loads(value) if value.startswith("{") else dict([value.split("=")])
    getattr(client, operation.replace("-", "_"))(**arguments)


def test_the_roles_are_made_by_the_commands_of_the_page_with_a_cluster_and_an_account_of_ones_own(
    aws: Callable[[str], Any], tmp_path: Path
) -> None:
    """Run the page's own commands; then send the recorded calls to a local IAM."""
    iam = aws("iam")
    for operation, *options in run_script("create-role", tmp_path):
        call(iam, tmp_path, operation, options)

    (tmp_path / "line.yaml").write_text(LINE)
    config = load(tmp_path / "line.yaml")
    subjects = {role.partition(":role/")[2]: subject for role, (subject,) in subjects_by_role().items()}
    for name in access.roles("my-line"):
        role = iam.get_role(RoleName=f"qlora-retrain-{name}")["Role"]
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        subject = statement["Condition"]["StringEquals"].pop("oidc.example/id/CAFE:sub")
        assert subjects.get(role["RoleName"], subject) == subject
        assert statement == {
            "Effect": "Allow",
            "Principal": {"Federated": "arn:aws:iam::444455556666:oidc-provider/oidc.example/id/CAFE"},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {"StringEquals": {"oidc.example/id/CAFE:aud": "sts.amazonaws.com"}},
        }
        rendered = policies.role_policy(config, name, "s3://my-bucket/qlora")
        assert iam.get_role_policy(RoleName=role["RoleName"], PolicyName="my-line")["PolicyDocument"] == rendered
    for file in ("overlays/production/accounts.yaml", "airflow/values.yaml"):
        assert "arn:aws:iam::444455556666:role/" in (tmp_path / "manifests" / file).read_text()


def test_the_bucket_gets_versioning_object_lock_a_lifecycle_and_its_policy_by_the_commands_of_the_page(
    aws: Callable[[str], Any], tmp_path: Path
) -> None:
    s3, calls = aws("s3"), run_script("put-bucket-policy", tmp_path)
    s3.create_bucket(Bucket="my-bucket", ObjectLockEnabledForBucket=True)
    for operation, *options in calls:
        call(s3, tmp_path, operation, options)
    assert s3.get_bucket_versioning(Bucket="my-bucket")["Status"] == "Enabled"
    policy = json.loads(s3.get_bucket_policy(Bucket="my-bucket")["Policy"])
    assert policy == policies.bucket_policy("s3://my-bucket/qlora")
    assert [operation for operation, *_ in calls] == [
        "put-bucket-versioning",
        "put-object-lock-configuration",
        "put-bucket-lifecycle-configuration",
        "put-bucket-policy",
    ]
    s3.delete_bucket_policy(Bucket="my-bucket")  # servers of this process share their buckets
    s3.delete_bucket(Bucket="my-bucket")


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
    # What was deleted can be brought back for longer than any retention lasts.
    (noncurrent,) = [
        rule["NoncurrentVersionExpiration"] for rule in rules_in_s3 if "NoncurrentVersionExpiration" in rule
    ]
    limits = PublishConfig.model_json_schema()["properties"]["retention_days"]
    assert limits["maximum"] < noncurrent["NoncurrentDays"] == 30
