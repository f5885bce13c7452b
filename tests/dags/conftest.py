"""An AIRFLOW_HOME for the tests, set before anything imports Airflow; one Airflow for several modules; the pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.demo.airflow_api import AirflowApi
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.runtimes.airflow.move_request import APPROVAL_DAG, MOVE_DAG
from qlora_retrain.storage import key_admin, open_store

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


USERS = ("alice", "bob", "carol")
CHAT = '{{"messages": [{{"role": "user", "content": "order {0}"}}, {{"role": "assistant", "content": "a"}}]}}\n'
# A line that trains, for tests that take minutes.
TRAINED_LINE = {
    "data": {"task": "labels", "eval_fraction": 0.3, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 6, "micro_batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"allow_first_release": True, "bootstrap_samples": 200, "stop_rows": 0, "train_rows": 0},
    "merge": {"max_loss_increase_nats": 2.0, "min_prompts": 10},
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
        return subprocess.run(command, input=text, env=variables, capture_output=True, text=True, timeout=300)

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


@pytest.fixture(scope="session")
def site_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_tickets: Callable[[Path, int], Path]
) -> Path:
    """Lines with and without approval, of which one has approvers, and two that are followed by a consumer."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "pipelines" / "base").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / "pipelines" / "base" / name).write_text("{}")
    (folder / "pipelines" / "rows.jsonl").write_text("".join(CHAT.format(i) for i in range(30)))
    sources = {"raw_data": "rows.jsonl", "base_model": "base"}
    lines: dict[str, dict[str, Any]] = {
        line: {"publish": {"approval": line != "mails"}} for line in ("mails", "tickets", "notes", "letters", "parcels")
    }
    lines["bulletins"] = {"sources": {**sources, "base_model": str(tiny_model)}}
    tickets = str(write_tickets(folder / "tickets.jsonl", 200))
    lines["chronicles"] = {**TRAINED_LINE, "sources": {"raw_data": tickets, "base_model": str(tiny_model)}}
    for line, sections in lines.items():
        document = {"line": line, "sources": sources, **sections}
        (folder / "pipelines" / f"{line}.yaml").write_text(yaml.safe_dump(document))
    questions = folder / "questions.jsonl"
    questions.write_text('{"question": "where is the parcel of order 7", "contains": "delivery"}\n')
    consumers = {
        line: {
            "folder": str(folder / "served" / line),
            "questions": str(questions),
            "answers": str(folder / f"{line}-answers.jsonl"),
            "min_right_fraction": 0.0,
        }
        for line in ("bulletins", "chronicles")
    }
    approvers = {"tickets": ["alice", "bob"], "letters": ["bob"]}
    (folder / "platform.yaml").write_text(yaml.safe_dump({"approvers": approvers, "consumers": consumers}))
    (folder / "served").mkdir()
    # Signed from the start, whichever module comes first: a run's first plan would make the keys of its line alone.
    key_admin.create(open_store((folder / "store").as_uri()), lines)
    return folder


@pytest.fixture(scope="session")
def shared_airflow(site_folder: Path) -> Iterator[StandaloneAirflow]:
    """A real Airflow with four users, which several modules share: `tests/schedule.py` keeps them in one process."""
    environment = {
        "QLORA_RETRAIN_PIPELINES": str(site_folder / "pipelines"),
        "QLORA_RETRAIN_PLATFORM": str(site_folder / "platform.yaml"),
        "QLORA_RETRAIN_ROOT": (site_folder / "store").as_uri(),
        "QLORA_RETRAIN_CACHE": str(site_folder / "cache"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{user}:admin" for user in ("admin", *USERS)),
    }
    with StandaloneAirflow(site_folder / "home", environment=environment, parallelism=3) as airflow:
        for dag_id in (MOVE_DAG, APPROVAL_DAG):
            airflow.wait_for_dag(dag_id)
        yield airflow


@pytest.fixture(scope="module")
def airflow(shared_airflow: StandaloneAirflow, request: pytest.FixtureRequest) -> Iterator[StandaloneAirflow]:
    """The shared Airflow; it is stopped after the last module that uses it, and not beside all tests that follow."""
    yield shared_airflow
    users = [item.path for item in request.session.items if "shared_airflow" in getattr(item, "fixturenames", ())]
    if users[-1] == request.path:
        shared_airflow.stop()


@pytest.fixture(scope="module")
def user_api(airflow: StandaloneAirflow) -> Callable[[str], AirflowApi]:
    """Sign in as one of the users, whose passwords Airflow made when it started."""
    passwords = json.loads((airflow.home / "passwords.json").read_text())
    apis = {user: AirflowApi(airflow.url, passwords[user], user) for user in ("admin", *USERS)}
    return apis.__getitem__
