"""The whole pipeline in containers, run by Airflow's scheduler and by kfp's local runner.

Runs are killed in the middle and finished by the same orchestrator or by the other. Both use one store and make the
same keys, and a step succeeded if its manifest says so.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import psutil
import pytest
import yaml

from qlora_retrain.demo.airflow_api import AirflowApiError
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.pipeline import make_plan, status
from qlora_retrain.pipeline import plan as plans
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
KFP = project_root() / ".venv-kfp" / "bin" / "qlora-retrain"
STEP_LABEL = "qlora-retrain.step"
STEPS_OF_A_LONG_RUN = 1500  # 30 seconds of training, so that it can be stopped in the middle


@dataclass
class Orchestrators:
    """An engine, an Airflow whose line runs in containers on it, the `kfp` command, and a store in S3."""

    engine: Engine
    airflow: StandaloneAirflow
    config: Path
    root: str
    wait_until: Callable[..., None]
    output_folder: Path

    def start(self, **params: object) -> str:
        return self.airflow.api.trigger("boxed", params)

    def wait_for_plan(self, run_id: str) -> Plan:
        self.wait_until(lambda: self.state(run_id, "plan") == "success")
        dag_run = self.airflow.api.dag_run("boxed", run_id)
        run_after = datetime.fromisoformat(dag_run["run_after"])
        return Plan.read(plans.plan_uri(self.root, plans.run_id(run_after, "boxed", run_id)))

    def state(self, run_id: str, task: str) -> str | None:
        return next(t.state for t in self.airflow.api.task_states("boxed", run_id) if t.task_id == task)

    def log(self, run_id: str, task: str, try_number: int = 1) -> str:
        """Return the log of one try; empty while there is none."""
        try:
            return "\n".join(self.airflow.api.log_lines("boxed", run_id, task, try_number))
        except AirflowApiError as error:
            if error.status != 404:
                raise
            return ""

    def wait_for_checkpoint(self, plan: Plan) -> None:
        """Wait for a complete checkpoint in the store: then the training is in the middle."""
        store, scratch = open_store(self.root), f"scratch/train_qlora/{plan.step('train_qlora').key}"
        self.wait_until(lambda: any(e.path.endswith("_complete.json") for e in store.list(scratch)), 900)

    def wait_for_training_container(self, plan: Plan) -> str:
        """Wait until the training is in the middle; return the name of its container under Airflow."""
        self.wait_for_checkpoint(plan)
        (name,) = self.engine.names(plan.step("train_qlora").key[:12])
        return name

    def kfp(self, *arguments: object) -> subprocess.Popen[str]:
        """Start `qlora-retrain kfp VERB`, with its output in a new file of `output_folder`."""
        environment = {**os.environ, "DOCKER_HOST": self.engine.url, "OMP_NUM_THREADS": "1"}
        environment["QLORA_RETRAIN_PLATFORM"] = str(self.config.parents[1] / "platform.yaml")
        log = (self.output_folder / f"kfp-{len(list(self.output_folder.iterdir()))}.log").open("w")
        command = [str(KFP), "kfp", *map(str, arguments), "--root", self.root]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)

    def kfp_containers(self) -> list[str]:
        """List the containers that kfp's runner started and that still exist."""
        return self.engine("ps", "-a", "--filter", f"label={STEP_LABEL}=kfp", "--format", "{{.Names}}").split()

    def last_kfp_output(self) -> str:
        """Return the output of the last `kfp` command."""
        return max(self.output_folder.glob("kfp-*.log"), key=lambda p: p.stat().st_mtime).read_text()


@pytest.fixture(scope="module")
def orchestrators(
    engine: Engine,
    images: None,
    s3: str,
    make_line: Callable[..., Path],
    wait_until: Callable[..., None],
    canaries: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Orchestrators]:
    folder = tmp_path_factory.mktemp("orchestrators")
    config = make_line()

    # A registry's password, in the file where `docker login` puts it.
    auth = base64.b64encode(f"me:{canaries['registry']}".encode()).decode()
    (folder / "docker").mkdir()
    (folder / "docker" / "config.json").write_text(json.dumps({"auths": {"registry.example": {"auth": auth}}}))
    (folder / "output").mkdir()

    environment = {
        "QLORA_RETRAIN_ROOT": s3,
        "QLORA_RETRAIN_PIPELINES": str(config.parent),
        "QLORA_RETRAIN_PLATFORM": str(config.parents[1] / "platform.yaml"),
        "DOCKER_HOST": engine.url,
        "DOCKER_CONFIG": str(folder / "docker"),
        # Secrets that a worker may have and its containers must not.
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": canaries["environment"],
        "AWS_SESSION_TOKEN": canaries["session"],
        "AIRFLOW_CONN_AWS_DEFAULT": json.dumps({"conn_type": "aws", "login": "a", "password": canaries["connection"]}),
        # Airflow notices a killed worker after 20 seconds instead of five minutes.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
    }
    with StandaloneAirflow(folder / "home", environment=environment) as airflow:
        airflow.wait_for_dag("boxed")
        airflow.api.unpause("boxed")
        yield Orchestrators(engine, airflow, config, s3, wait_until, folder / "output")
        engine.remove_everything()


class Watcher:
    """Record every container of a step that runs during a block, and what `podman inspect` shows of it."""

    def __init__(self, engine: Engine, step: str) -> None:
        self.engine, self.step = engine, step
        self.max_at_once, self.ids, self.inspected = 0, set[str](), list[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        command = ["ps", "--filter", f"label={STEP_LABEL}={self.step}", "--format", "{{.ID}}", "--no-trunc"]
        while not self._stop.wait(0.5):
            running_ids = self.engine(*command).split()
            self.max_at_once = max(self.max_at_once, len(running_ids))
            for new_id in set(running_ids) - self.ids:
                self.ids.add(new_id)
                # It may end in this moment, so the command may fail.
                completed = subprocess.run(["podman", "inspect", new_id], capture_output=True, text=True)
                self.inspected.append(completed.stdout)


@contextlib.contextmanager
def suspended(orchestrators: Orchestrators, name: str) -> Iterator[None]:
    """Suspend a container's processes during a block, so that it cannot end before others have noticed it."""
    first = psutil.Process(int(orchestrators.engine("inspect", "--format", "{{.State.Pid}}", name)))
    processes = [first, *first.children(recursive=True)]
    assert len(processes) >= 2, "the entrypoint and the step"
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def kill_worker(orchestrators: Orchestrators, run_id: str, task: str) -> None:
    """SIGKILL the executor's process that works on a task, and the task's own process below it."""
    task_instance = orchestrators.airflow.api.request("GET", f"dags/boxed/dagRuns/{run_id}/taskInstances/{task}")
    workers = [p for p in psutil.process_iter(["cmdline"]) if task_instance["id"] in " ".join(p.info["cmdline"] or ())]
    assert len(workers) == 2, workers
    for process in workers:
        process.send_signal(signal.SIGKILL)


def manifests(root: str) -> list[dict[str, Any]]:
    store = open_store(root)
    paths = [e.path for e in store.list("artifacts") if e.path.endswith("_manifest.json")]
    return [json.loads(store.read(path).data) for path in paths]


def production(root: str) -> tuple[str, str]:
    """Return the version in production, and the id of the run that published it."""
    store = open_store(root)
    alias, _ = registry.read_alias(store, "boxed", registry.PRODUCTION)
    assert alias is not None
    release = registry.read_release(store, "boxed", alias.version, sha256=alias.manifest_sha256)
    return release.version, release.provenance["run_id"]


@pytest.mark.soak  # the tests below run the pipeline by both; those of the Docker runtime stop and follow containers
def test_a_run_whose_container_is_stopped_and_whose_worker_is_killed_ends_with_the_keys_of_any_runtime(
    orchestrators: Orchestrators, tmp_path: Path
) -> None:
    run_id = orchestrators.start(**{"train.max_steps": STEPS_OF_A_LONG_RUN})
    plan = orchestrators.wait_for_plan(run_id)
    with Watcher(orchestrators.engine, "train_qlora") as watcher:
        orchestrators.engine("kill", "--signal", "TERM", orchestrators.wait_for_training_container(plan))
        orchestrators.wait_until(lambda: "try again (75)" in orchestrators.log(run_id, "train_qlora", 1))
        orchestrators.wait_until(lambda: "resuming from" in orchestrators.log(run_id, "train_qlora", 2), 600)

        # The third try must find the container of the second, though it could have finished by then.
        (second_container,) = orchestrators.engine.names(plan.step("train_qlora").key[:12])
        with suspended(orchestrators, second_container):
            kill_worker(orchestrators, run_id, "train_qlora")
            orchestrators.wait_until(
                lambda: "runs already: following it" in orchestrators.log(run_id, "train_qlora", 3), 600
            )
        state = orchestrators.airflow.api.wait_until_finished("boxed", run_id, timeout_seconds=1200)

    assert state == "success", [
        orchestrators.log(run_id, t.task_id, t.try_number)
        for t in orchestrators.airflow.api.task_states("boxed", run_id)
    ]
    assert watcher.max_at_once == 1, "a second container ran beside the first"
    assert len(watcher.ids) == 2, "one for the first try, and one for the second and the third"
    (resumed_step,) = re.findall(
        r"resuming from scratch/train_qlora/\S+checkpoint-(\d+)", orchestrators.log(run_id, "train_qlora", 2)
    )
    assert 0 < int(resumed_step) < STEPS_OF_A_LONG_RUN
    assert status.numbers(plan, "train_qlora")["steps"] == STEPS_OF_A_LONG_RUN

    plan_elsewhere = make_plan.make_plan(
        orchestrators.config, tmp_path.as_uri(), overrides=[f"train.max_steps={STEPS_OF_A_LONG_RUN}"]
    )
    written_manifests = manifests(orchestrators.root)
    assert {m["step"]: m["key"] for m in written_manifests} == {step.name: step.key for step in plan_elsewhere.steps}
    images = {m["provenance"]["image"].partition(":")[0] for m in written_manifests}
    assert images == {"qlora-retrain-light", "qlora-retrain-train"}
    assert production(orchestrators.root)[1] == plan.run_id
    assert orchestrators.engine.names(plan.run_id) == []


def test_kfps_own_runner_runs_the_whole_pipeline_with_the_same_keys_and_shows_its_reports(
    orchestrators: Orchestrators, tmp_path: Path
) -> None:
    root, outputs = "s3://models/kubeflow", orchestrators.output_folder / "outputs"
    orchestrators.root, airflow_root = root, orchestrators.root
    try:
        process = orchestrators.kfp("run", orchestrators.config, "--outputs", outputs)
        assert process.wait(1200) == 0, orchestrators.last_kfp_output()
    finally:
        orchestrators.root = airflow_root

    plan_elsewhere = make_plan.make_plan(orchestrators.config, tmp_path.as_uri())
    assert {m["step"]: m["key"] for m in manifests(root)} == {step.name: step.key for step in plan_elsewhere.steps}
    assert f"Published {production(root)[0]}, promoted to production." in orchestrators.last_kfp_output()

    # What KFP's UI would show, by (task, output).
    shown_outputs = {
        path.relative_to(outputs).parts[2:]: path.read_text() for path in outputs.rglob("*") if path.is_file()
    }
    for step in ("validate-data", "train-qlora", "evaluate", "merge-adapter"):
        assert shown_outputs[step, "report"].startswith("<!doctype html>")
    assert shown_outputs["summary", "report"] == shown_outputs["evaluate", "report"]
    assert f"Published {production(root)[0]}" in shown_outputs["summary", "page"]
    assert "train_qlora" in shown_outputs["plan", "report"]
    numbers = json.loads(shown_outputs["train-qlora", "executor_output.json"])["artifacts"]["numbers"]["artifacts"][0][
        "metadata"
    ]
    assert numbers["steps"] == 10 * math.ceil(246 / 16)  # epochs, rows and batch of the line
    assert orchestrators.kfp_containers() == []


def test_a_run_that_airflow_began_and_lost_in_training_is_finished_by_kubeflow(orchestrators: Orchestrators) -> None:
    run_id = orchestrators.start(**{"train.max_steps": STEPS_OF_A_LONG_RUN, "train.learning_rate": 4e-3})
    plan = orchestrators.wait_for_plan(run_id)
    # SIGKILL, so that nothing more is saved, as when a machine is lost.
    orchestrators.engine("kill", orchestrators.wait_for_training_container(plan))
    orchestrators.airflow.api.mark_failed("boxed", run_id)
    orchestrators.wait_until(lambda: orchestrators.engine.names(plan.run_id) == [])
    assert status.find_manifest(plan, "train_qlora") is None

    process = orchestrators.kfp("run", orchestrators.config, "--resume", plan.run_id)
    assert process.wait(1200) == 0, orchestrators.last_kfp_output()
    assert "resuming from scratch/train_qlora/" in orchestrators.last_kfp_output()
    assert "validate_data: dataset" in orchestrators.last_kfp_output(), "Airflow had made it"
    assert production(orchestrators.root)[1] == plan.run_id


@pytest.mark.soak  # the test before hands a run over in the other direction
def test_a_run_that_kubeflow_began_and_that_was_stopped_in_training_is_finished_by_airflow(
    orchestrators: Orchestrators,
) -> None:
    overrides = [f"train.max_steps={STEPS_OF_A_LONG_RUN}", "train.learning_rate=3e-3"]
    process = orchestrators.kfp("run", orchestrators.config, *(word for item in overrides for word in ("--set", item)))
    orchestrators.wait_until(
        lambda: re.search(r"^ *plan (s3://\S+)$", orchestrators.last_kfp_output(), re.MULTILINE), 600
    )
    (uri,) = set(re.findall(r"^ *plan (s3://\S+)$", orchestrators.last_kfp_output(), re.MULTILINE))
    plan = Plan.load(uri)

    orchestrators.wait_for_checkpoint(plan)
    process.terminate()
    assert process.wait(600) == 130
    assert orchestrators.kfp_containers() == [], "stopped, after it had saved"

    run_id = orchestrators.start(resume_run=plan.run_id)
    assert orchestrators.airflow.api.wait_until_finished("boxed", run_id, timeout_seconds=1200) == "success"
    log = orchestrators.log(run_id, "train_qlora")
    assert "resuming from scratch/train_qlora/" in log
    assert production(orchestrators.root)[1] == plan.run_id


def test_no_secret_of_any_channel_is_anywhere_afterwards(
    orchestrators: Orchestrators, canaries: dict[str, str], tmp_path: Path
) -> None:
    """Run a line that is refused in each orchestrator, then search everything that was ever written."""
    with Watcher(orchestrators.engine, "validate_data") as watcher:
        run_id = orchestrators.start(**{"data.max_quarantined_fraction": 0.01, "train.max_steps": 1})
        state = orchestrators.airflow.api.wait_until_finished("boxed", run_id, timeout_seconds=1200)
    assert state == "failed", "one step of training cannot pass"
    process = orchestrators.kfp("run", orchestrators.config, "--set", "train.max_steps=1")
    assert process.wait(1200) == 11, orchestrators.last_kfp_output()

    package = orchestrators.output_folder / "retrain.yaml"
    completed = subprocess.run([KFP, "kfp", "compile", "--out", package], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert len(list(yaml.safe_load_all(package.read_text()))) == 2

    client = boto3.client("s3")
    texts = {"inspect": "".join(watcher.inspected)}
    for folder in (orchestrators.airflow.home, orchestrators.output_folder):
        texts |= {
            str(path): path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file()
        }
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for item in page["Contents"]:
            body = client.get_object(Bucket="models", Key=item["Key"])["Body"].read()
            texts[item["Key"]] = body.decode("utf-8", "replace")

    # Also in base64, without the last character, which depends on what follows the secret.
    encoded = {name: base64.b64encode(secret.encode()).decode().rstrip("=")[:-1] for name, secret in canaries.items()}
    leaks = [
        (name, where)
        for where, text in texts.items()
        for name, secret in canaries.items()
        if secret in text or encoded[name] in text
    ]
    assert leaks == []
    # The search was not empty: it covered the database, task logs, containers, plans and manifests.
    for kind in (
        "airflow.db",
        "task_id=train_qlora",
        "inspect",
        "/plan.json",
        "_manifest.json",
        "retrain.yaml",
        "report",
    ):
        assert any(kind in where and text for where, text in texts.items()), kind
    assert "AWS_WEB_IDENTITY_TOKEN_FILE=/run/secrets/aws-web-identity-token-file" in texts["inspect"]
