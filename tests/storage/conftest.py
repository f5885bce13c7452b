"""A real S3 server on loopback (moto's), and `store`: every test that takes it runs on both backends.

`TEST_S3_ENDPOINT=http://127.0.0.1:7480` leads the same tests to another server, with the credentials and the checksum
settings of the environment: `pytest tests/storage/test_store_contract.py` against a Ceph, a Swift or a MinIO.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import Store

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
BUCKET = "retraining"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a server with one empty bucket; while it runs, the environment leads every S3 client to it."""
    if endpoint := os.environ.get("TEST_S3_ENDPOINT"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            create_bucket()
            yield endpoint
        return

    from moto.server import ThreadedMotoServer

    # A line of a log for each request takes as long as many a request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        create_bucket()
        yield f"http://{host}:{port}"
    server.stop()


def create_bucket() -> None:
    import boto3.session

    with contextlib.closing(boto3.session.Session().client("s3")) as client:
        client.create_bucket(Bucket=BUCKET)


@pytest.fixture
def s3_uri(s3_server: str) -> str:
    return f"s3://{BUCKET}/team a/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty store."""
    if request.param == "local":
        return (tmp_path / "a store").as_uri()
    uri: str = request.getfixturevalue("s3_uri")
    return uri


@pytest.fixture
def store(root: str) -> Store:
    return open_store(root)
