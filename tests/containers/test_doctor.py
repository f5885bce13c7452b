"""The doctor as its job runs it: in a container, with an account's token, against an API and an S3 on loopback.

The base image and this environment's packages stand for Airflow's image, which no test can pull.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from qlora_retrain.pipeline.code_identity import project_root
from tests.containers.conftest import BASE, Engine
from tests.runtimes.kubernetes.applied_cluster import applied_cluster
from tests.runtimes.kubernetes.misconfigurations import TEN, Misconfiguration, Scene
from tests.runtimes.kubernetes.spoiled_s3 import spoiled_s3

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
AIRFLOW_USER = "50000:50000"


@pytest.fixture
def scene(tmp_path: Path, s3: str, engine: Engine) -> Iterator[Scene]:
    client = boto3.client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="doctor")
    if subprocess.run(["podman", "image", "exists", BASE]).returncode:
        subprocess.run([project_root() / "images" / "base.sh", BASE], check=True)
    for cluster in applied_cluster(tmp_path, secure=True):
        for server in spoiled_s3(os.environ["AWS_ENDPOINT_URL"]):
            yield Scene.prepare(cluster, server, tmp_path)


def run_doctor(scene: Scene) -> tuple[int, dict[str, Any]]:
    """Run the job's command in a container, with a read-only root and the token where a kubelet mounts it."""
    folder, cluster = scene.profile.parent, scene.cluster
    for readable in (*folder.parents[:2], folder):
        readable.chmod(0o755)
    token = folder / "token"
    token.write_text("canary-token-of-the-doctor")
    job = yaml.safe_load((project_root() / "manifests" / "doctor" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {
        "PYTHONPATH": "/git/repo/src:/packages",
        "PYTHONDONTWRITEBYTECODE": "1",
        "QLORA_RETRAIN_PROFILE": "/profile.yaml",
        "QLORA_RETRAIN_PLATFORM": "/git/repo/manifests/platform.yaml",
        "QLORA_RETRAIN_ROOT": "s3://doctor/qlora",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": cluster.url.rpartition(":")[2],
        "AWS_ENDPOINT_URL": scene.s3.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": "/credentials",
    }
    mounts = {
        str(project_root() / "src"): "/git/repo/src",
        str(project_root() / "manifests"): "/git/repo/manifests",
        str(Path(sysconfig.get_path("purelib")).resolve()): "/packages",
        str(scene.profile): "/profile.yaml",
        os.environ["AWS_SHARED_CREDENTIALS_FILE"]: "/credentials",
        str(token): f"{TOKEN_FOLDER}/token",
        str(cluster.authority): f"{TOKEN_FOLDER}/ca.crt",
    }
    completed = subprocess.run(
        [
            "podman", "run", "--rm", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges",
            f"--user={AIRFLOW_USER}",
            *(f"--env={name}={value}" for name, value in environment.items()),
            *(f"--volume={source}:{target}:ro" for source, target in mounts.items()),
            BASE, "python3", *container["command"][1:], "--json",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert completed.stdout.startswith("{"), completed.stdout + completed.stderr
    assert "canary" not in completed.stdout + completed.stderr
    return completed.returncode, json.loads(completed.stdout)


def test_the_doctor_in_a_container_finds_a_cluster_well_and_names_what_was_spoiled(scene: Scene) -> None:
    code, document = run_doctor(scene)
    states = {finding["check"]: finding["state"] for finding in document["findings"]}
    assert [finding for finding in document["findings"] if finding["state"] == "fault"] == []
    assert code == 0
    assert states["dry run"] == states["conditions"] == "ok"
    assert states["lines"] == "not known", "no line was named, and each line has an account of its own"

    spoiled = [wrong for wrong in TEN if wrong.check in ("write", "quota", "accounts")]
    for wrong in spoiled:
        wrong.spoil(scene)
    code, document = run_doctor(scene)
    assert code == 12
    messages = [finding["message"] for finding in document["findings"] if finding["state"] == "fault"]
    assert all(any(wrong.text in message for message in messages) for wrong in spoiled), messages


@pytest.mark.soak
@pytest.mark.parametrize("wrong", TEN, ids=lambda wrong: wrong.name)
def test_each_of_ten_misconfigurations_is_named_by_the_doctor_in_a_container(
    wrong: Misconfiguration, scene: Scene
) -> None:
    wrong.spoil(scene)
    code, document = run_doctor(scene)
    assert code == 12
    faults = [finding for finding in document["findings"] if finding["state"] == "fault"]
    assert {finding["check"] for finding in faults} == {wrong.check, *wrong.more_faults}
    assert any(wrong.text in finding["message"] for finding in faults if finding["check"] == wrong.check)
