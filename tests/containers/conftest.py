"""A real engine and real images: podman's Docker API on a socket, images built here, from nothing if need be."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from qlora_retrain.code import project_root

BASE = "localhost/qlora-retrain-base:bookworm"
CREDENTIALS = "[default]\naws_access_key_id = test\naws_secret_access_key = {secret}\n"


def podman(*arguments: str) -> str:
    """Podman's output."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`DOCKER_HOST` of a running engine."""
    if shutil.which("podman") is None:
        missing = "podman is not installed: apt-get install podman runc debootstrap"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    os.environ["CONTAINERS_CONF"] = str(Path(__file__).parent / "containers.conf")
    socket = tmp_path_factory.mktemp("engine") / "podman.sock"
    with subprocess.Popen(["podman", "system", "service", "--time=0", f"unix://{socket}"]) as service:
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert time.monotonic() < deadline, "podman's API did not start"
            time.sleep(0.1)
        yield f"unix://{socket}"
        service.terminate()
    os.environ.pop("CONTAINERS_CONF")


@pytest.fixture(scope="session")
def images(engine: str) -> None:
    """Both images, built with the command that people use."""
    if subprocess.run(["podman", "image", "exists", BASE]).returncode:
        subprocess.run([project_root() / "images" / "base.sh", BASE], check=True)
    built = subprocess.run(
        ["make", "images", f"BASE_IMAGE={BASE}", "ENGINE=podman"], cwd=project_root(), capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The root of a store on a running S3; this process, and what it starts, can use it through a credentials file."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = tmp_path / "credentials"
    credentials.write_text(CREDENTIALS.format(secret=CANARY))
    credentials.chmod(0o644)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    boto3.client("s3").create_bucket(Bucket="models")
    try:
        yield "s3://models/team"
    finally:
        server.stop()


CANARY = "canary-do-not-leak-7f3a"
