"""An AIRFLOW_HOME of the tests' own, set before anything imports Airflow; the Kubeflow pipeline, compiled once."""

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
    "work_gib": 50,
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
class Compiled:
    """The two documents of a package: the pipeline, and what its pods get."""

    pipeline: dict[str, Any]
    platform: dict[str, Any]
    text: str

    @property
    def steps(self) -> dict[str, Any]:
        """The tasks inside the exit handler: the plan and the graph's steps."""
        found: dict[str, Any] = self.pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
        return found

    @property
    def tasks(self) -> dict[str, Any]:
        """Those, and the exit handler's own."""
        return {**self.steps, "summary": self.pipeline["root"]["dag"]["tasks"]["summary"]}

    def component(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.pipeline["components"][self.tasks[kfp_name(name)]["componentRef"]["name"]]
        return found

    def container(self, name: str) -> dict[str, Any]:
        """What a task runs, found as KFP finds it: task, component, executor."""
        executors = self.pipeline["deploymentSpec"]["executors"]
        found: dict[str, Any] = executors[self.component(name)["executorLabel"]]["container"]
        return found

    def pod(self, name: str) -> dict[str, Any]:
        executors = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        found: dict[str, Any] = executors[self.component(name)["executorLabel"]]
        return found


def kfp_name(name: str) -> str:
    return name.replace("_", "-")


@pytest.fixture(scope="session")
def in_kfp() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the Python that has kfp, on this checkout."""

    def run(*arguments: object, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        if not KFP_PYTHON.exists():
            pytest.fail(f"{KFP_PYTHON} is missing; make it with: make setup")
        everything = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), **environment}
        command = [str(KFP_PYTHON), *map(str, arguments)]
        return subprocess.run(command, input=text, env=everything, capture_output=True, text=True, timeout=120)

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
) -> Compiled:
    """The pipeline as KFP will read it."""
    out = tmp_path_factory.mktemp("kfp") / "new folder" / "retrain.yaml"
    done = in_kfp("-m", "qlora_retrain.cli", "kfp", "compile", "--out", out, "--profile", profile_file)
    assert done.returncode == 0, done.stderr
    pipeline, platform = yaml.safe_load_all(out.read_text())
    return Compiled(pipeline, platform, out.read_text())
