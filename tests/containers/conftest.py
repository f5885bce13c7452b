"""A real engine and real images: podman's Docker API on a socket, and images built here, base image included."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from qlora_retrain.pipeline.code_identity import project_root

os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-home-")  # before anything imports Airflow
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"

BASE = "localhost/qlora-retrain-base:bookworm"
LINE = {
    "line": "boxed",
    "data": {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256},
    "train": {
        "learning_rate": 5e-3,
        "epochs": 10,
        "micro_batch_size": 16,
        "dropout": 0.0,
        "rank": 8,
        "checkpoint_minutes": 0.02,
    },
    "evaluate": {
        "allow_first_release": True,
        "min_gain_over_base": 0.1,
        "bootstrap_samples": 500,
        "max_loss_to_champion": 1,
    },
    "merge": {"max_loss_increase_nats": 0.5, "min_prompts": 10},
}
PLATFORM = {"runtime": {"kind": "docker", "network": "host", "memory_gib": 8}}
# A fake secret for every way in which a credential can reach a worker; none may be found anywhere afterwards.
CANARIES = {
    "credentials file": "canary-file-7f3a",
    "config file": "canary-config-9c1d",
    "token file": "canary-token-22e8",
    "environment": "canary-environment-04b7",
    "session": "canary-session-c55e",
    "connection": "canary-connection-8a60",
    "registry": "canary-registry-f19b",
}


@dataclass
class Engine:
    """Podman behind Docker's API, on its own socket; it can be stopped and started while containers run.

    Its working directory is the socket's folder, because a container that is killed for memory leaves a file `oom` in
    the working directory.
    """

    socket: Path
    service: subprocess.Popen[bytes] | None = None
    base: str = BASE

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        command = ["podman", "system", "service", "--time=0", self.url]
        self.service = subprocess.Popen(command, cwd=self.socket.parent)
        wait_until(self.socket.exists)

    def stop(self) -> None:
        assert self.service is not None
        self.service.kill()
        self.service.wait()
        self.socket.unlink(missing_ok=True)

    def names(self, step: str = "") -> list[str]:
        """List the names of this project's containers, running or not; `step` is a part of the name."""
        names = self("ps", "-a", "--filter", "label=qlora-retrain.step", "--format", "{{.Names}}").split()
        return [name for name in names if step in name]

    def __call__(self, *arguments: str) -> str:
        """Run podman's own command, which needs no service; return its output."""
        completed = subprocess.run(["podman", *arguments], cwd=self.socket.parent, capture_output=True, text=True)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def remove_everything(self) -> None:
        """Remove the containers that a test left."""
        for name in self.names():
            with contextlib.suppress(AssertionError):
                self("rm", "-f", name)


def wait_until(true: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="session", name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    return wait_until


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Start an engine; skip the tests where podman is not installed, except in CI."""
    if shutil.which("podman") is None:
        missing = "podman is not installed: apt-get install podman runc debootstrap"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)

    os.environ["CONTAINERS_CONF"] = str(Path(__file__).parent / "containers.conf")
    engine = Engine(tmp_path_factory.mktemp("engine") / "podman.sock")
    engine.start()
    yield engine
    engine.stop()
    os.environ.pop("CONTAINERS_CONF")


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """Collect garbage after each test, so that a leaked socket fails the test that leaked it."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def images(engine: Engine) -> None:
    """Build both images with the command that people use."""
    if subprocess.run(["podman", "image", "exists", BASE]).returncode:
        subprocess.run([project_root() / "images" / "base.sh", BASE], check=True)
    built = subprocess.run(
        ["make", "images", f"BASE_IMAGE={BASE}", "ENGINE=podman"],
        cwd=project_root(),
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start an S3; return the root of a store in it, which this process reaches through a credentials file."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    # Containers run as another user, who must be able to read the files.
    folder = tmp_path_factory.mktemp("credentials")
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    for name, text in {
        "credentials": f"[default]\naws_access_key_id = a\naws_secret_access_key = {CANARIES['credentials file']}\n",
        "config": f"[profile other]\naws_secret_access_key = {CANARIES['config file']}\n",
        "token": CANARIES["token file"],
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
        patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        patch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "token"))
        patch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/retrain")  # with it, boto3 uses the token
        boto3.client("s3").create_bucket(Bucket="models")
        try:
            yield "s3://models/team"
        finally:
            server.stop()


@pytest.fixture(scope="session")
def make_line(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_tickets: Callable[[Path, int], Path]
) -> Callable[..., Path]:
    """Write a line into a new folder, with changed sections, and with sources that the images' user can read.

    The platform's settings are beside the folder of lines, in platform.yaml.
    """

    def make(**changes: dict[str, object]) -> Path:
        folder = tmp_path_factory.mktemp("line")
        tickets = write_tickets(folder / "tickets.jsonl", 300)
        for readable in (*folder.parents[:2], folder, *tiny_model.parents[:2], tiny_model):
            readable.chmod(0o755)
        for file in (*tiny_model.iterdir(), tickets):
            file.chmod(0o644)

        document: dict[str, Any] = {**LINE, "sources": {"raw_data": str(tickets), "base_model": str(tiny_model)}}
        for section, values in changes.items():
            document[section] = {**document[section], **values}
        path = folder / "pipelines" / "boxed.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(document))
        (folder / "platform.yaml").write_text(yaml.safe_dump(PLATFORM))
        return path

    return make


@pytest.fixture(scope="session")
def canaries() -> dict[str, str]:
    return CANARIES
