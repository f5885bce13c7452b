"""The same pipeline with its store in S3 (moto's server over HTTP): the same keys, the same result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

ACCOUNT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def s3() -> Iterator[str]:
    """Start a server; return its endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.mark.slow
def test_the_pipeline_on_s3_makes_the_same_keys_and_publishes(make_project: Callable, s3: str, tmp_path: Path) -> None:
    project = make_project()
    local_keys = _keys(project.cli("plan", project.config, "--root", project.root).out)
    project = dataclasses.replace(project, environment={**project.environment, **ACCOUNT, "AWS_ENDPOINT_URL": s3})

    client = boto3.client(
        "s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="models")
    root = "s3://models/team/a"
    result = project.run(root=root)
    assert result.exit_code == 0, result.text
    assert _keys(result.out) == local_keys
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", root)
    assert pulled.exit_code == 0, pulled.text
    stored = client.get_object(Bucket="models", Key="team/a/models/tiny/aliases/production.json")
    alias = json.loads(stored["Body"].read())
    assert json.loads((tmp_path / "m/manifest.json").read_text())["version"] == alias["version"]
    assert "unchanged" in project.run(root=root).out


def _keys(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if "will run" in line]
