"""An AIRFLOW_HOME for the tests, set before anything imports Airflow; the Kubeflow pipeline, compiled once."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-home-")
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"

PROJECT = Path(__file__).resolve().parents[2]
KFP_PYTHON = PROJECT / ".venv-kfp" / "bin" / "python"
PROFILE = {
    "light_image": "registry.example:5000/light:7",
    "train_image": "train@sha256:" + "0" * 64,
    "image_pull_secrets": ["registry"],
    "env": {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_SHARED_CREDENTIALS_FILE": "/run/secrets/aws/credentials"},
    "secrets": [{"name": "store-credentials", "mount": "/run/secrets/aws"}],
    "disk_gib": 50,
    "light": {"cpus": 0.5, "memory_gib": 2},
    "train": {"cpus": 4, "memory_gib": 32},
    "train_gpus": 2,
    "gpu": {
        "cpus": 8,
        "memory_gib": 64,
        "node_selector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
    },
}


@dataclass(frozen=True)
class CompiledPipeline:
    """The two documents of a compiled pipeline: the pipeline itself, and its settings for Kubernetes."""

    pipeline: dict[str, Any]
    platform: dict[str, Any]
    text: str

    @property
    def steps(self) -> dict[str, Any]:
        """The tasks inside the exit handler: the plan and the graph's steps."""
        tasks: dict[str, Any] = self.pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
        return tasks

    @property
    def tasks(self) -> dict[str, Any]:
        """All tasks: those inside the exit handler, and its own."""
        return {**self.steps, "summary": self.pipeline["root"]["dag"]["tasks"]["summary"]}

    def component(self, name: str) -> dict[str, Any]:
        component: dict[str, Any] = self.pipeline["components"][self.tasks[kfp_name(name)]["componentRef"]["name"]]
        return component

    def container(self, name: str) -> dict[str, Any]:
        """Return what a task runs, looked up as KFP does: from the task to its component to its executor."""
        executors = self.pipeline["deploymentSpec"]["executors"]
        container: dict[str, Any] = executors[self.component(name)["executorLabel"]]["container"]
        return container

    def pod(self, name: str) -> dict[str, Any]:
        executors = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        pod: dict[str, Any] = executors[self.component(name)["executorLabel"]]
        return pod


def kfp_name(name: str) -> str:
    return name.replace("_", "-")


@pytest.fixture(scope="session")
def in_kfp() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the Python of the environment that has kfp, with this checkout's code."""

    def run(*arguments: object, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        if not KFP_PYTHON.exists():
            pytest.fail(f"{KFP_PYTHON} is missing; make it with: make setup")
        variables = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), **environment}
        command = [str(KFP_PYTHON), *map(str, arguments)]
        return subprocess.run(command, input=text, env=variables, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="session")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "cluster.yaml"
    path.write_text(yaml.safe_dump(PROFILE))
    return path


@pytest.fixture(scope="session")
def compiled(
    in_kfp: Callable[..., subprocess.CompletedProcess[str]],
    profile_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> CompiledPipeline:
    """Compile the pipeline, and parse the YAML that KFP will read."""
    out = tmp_path_factory.mktemp("kfp") / "new folder" / "retrain.yaml"
    completed = in_kfp("-m", "qlora_retrain.cli", "kfp", "compile", "--out", out, "--profile", profile_file)
    assert completed.returncode == 0, completed.stderr
    pipeline, platform = yaml.safe_load_all(out.read_text())
    return CompiledPipeline(pipeline, platform, out.read_text())
