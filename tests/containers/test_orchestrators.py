"""The whole pipeline in containers, through Airflow's scheduler and through kfp's runner, killed in the middle and
finished by either: one store, the same keys, success by the manifests' word alone."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import psutil
import pytest
import yaml

from qlora_retrain.demo.airflow_api import ApiRefused
from qlora_retrain.demo.standalone_airflow import EmbeddedAirflow
from qlora_retrain.pipeline import execute, plan
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
KFP = project_root() / ".venv-kfp" / "bin" / "qlora-retrain"
STEP_LABEL = "qlora-retrain.step"
STEPS_OF_A_LONG_RUN = 1500  # half a minute, so that it can be stopped in the middle


@dataclass
class Setting:
    """An engine, an Airflow whose line runs in containers on it, and a store in S3."""

    engine: Engine
    airflow: EmbeddedAirflow
    config: Path
    root: str
    until: Callable[..., None]
    written: Path

    def start(self, **params: object) -> str:
        return self.airflow.api.trigger("boxed", params)

    def plan_of(self, run_id: str) -> Plan:
        self.until(lambda: self.state(run_id, "plan") == "success")
        found = self.airflow.api.run("boxed", run_id)
        at = plan.datetime.fromisoformat(found["run_after"])
        return Plan.load(plan.plan_uri(self.root, plan.run_id(at, "boxed", run_id)))

    def state(self, run_id: str, task: str) -> str | None:
        return next(t.state for t in self.airflow.api.tasks("boxed", run_id) if t.name == task)

    def log(self, run_id: str, task: str, tries: int = 1) -> str:
        """A try's log; empty while there is none."""
        try:
            return "\n".join(self.airflow.api.log("boxed", run_id, task, tries))
        except ApiRefused as error:
            if error.status != 404:
                raise
            return ""

    def checkpoint(self, made: Plan) -> None:
        """Wait for one in the store: then the training is in the middle."""
        store, scratch = open_store(self.root), f"scratch/train_qlora/{made.step('train_qlora').key}"
        self.until(lambda: any(e.path.endswith("_complete.json") for e in store.list(scratch)), 240)

    def training(self, made: Plan) -> str:
        """The name of the container that trains under Airflow, once it is in the middle."""
        self.checkpoint(made)
        (name,) = self.engine.names(made.step("train_qlora").key[:12])
        return name

    def kfp(self, *arguments: object) -> subprocess.Popen[str]:
        """`qlora-retrain kfp VERB`, with what it says in a file of its own."""
        environment = {**os.environ, "DOCKER_HOST": self.engine.url, "OMP_NUM_THREADS": "1"}
        log = (self.written / f"kfp-{len(list(self.written.iterdir()))}.log").open("w")
        command = [str(KFP), "kfp", *map(str, arguments), "--root", self.root]
        with log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)

    def of_kfp(self) -> list[str]:
        """The containers that kfp's runner started, as far as they are left."""
        return self.engine("ps", "-a", "--filter", f"label={STEP_LABEL}=kfp", "--format", "{{.Names}}").split()

    def said(self) -> str:
        """What the last KFP command said."""
        return max(self.written.glob("kfp-*.log"), key=lambda p: p.stat().st_mtime).read_text()


@pytest.fixture(scope="module")
def setting(
    engine: Engine,
    images: None,
    s3: str,
    make_line: Callable[..., Path],
    until: Callable[..., None],
    canaries: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("orchestrators")
    config = make_line()
    auth = base64.b64encode(f"me:{canaries['registry']}".encode()).decode()
    (folder / "docker").mkdir()
    (folder / "docker" / "config.json").write_text(json.dumps({"auths": {"registry.example": {"auth": auth}}}))
    (folder / "written").mkdir()
    environment = {
        "QLORA_RETRAIN_ROOT": s3,
        "QLORA_RETRAIN_PIPELINES": str(config.parent),
        "DOCKER_HOST": engine.url,
        "DOCKER_CONFIG": str(folder / "docker"),
        # What a worker may hold and its containers must not.
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": canaries["environment"],
        "AWS_SESSION_TOKEN": canaries["session"],
        "AIRFLOW_CONN_AWS_DEFAULT": json.dumps({"conn_type": "aws", "login": "a", "password": canaries["connection"]}),
        # A worker that was killed is found out in seconds, not in five minutes.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
    }
    with EmbeddedAirflow(folder / "home", environment=environment) as airflow:
        airflow.wait_for_dag("boxed")
        airflow.api.unpause("boxed")
        yield Setting(engine, airflow, config, s3, until, folder / "written")
        engine.sweep()


class Watcher:
    """Sees, while a block runs, every container of a step, and what an engine tells of it."""

    def __init__(self, engine: Engine, step: str) -> None:
        self.engine, self.step = engine, step
        self.most_at_once, self.ids, self.inspected = 0, set[str](), list[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        chosen = ["ps", "--filter", f"label={STEP_LABEL}={self.step}", "--format", "{{.ID}}", "--no-trunc"]
        while not self._stop.wait(0.5):
            now = self.engine(*chosen).split()
            self.most_at_once = max(self.most_at_once, len(now))
            for new in set(now) - self.ids:
                self.ids.add(new)
                done = subprocess.run(["podman", "inspect", new], capture_output=True, text=True)
                self.inspected.append(done.stdout)


@contextlib.contextmanager
def frozen(setting: Setting, name: str) -> Iterator[None]:
    """While open, a container does nothing: however fast the machine, it is not done before others have noticed."""
    first = psutil.Process(int(setting.engine("inspect", "--format", "{{.State.Pid}}", name)))
    processes = [first, *first.children(recursive=True)]
    assert len(processes) >= 2, "the entrypoint and the step"
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def kill_worker(setting: Setting, run_id: str, task: str) -> None:
    """SIGKILL the executor's process that works on a task, and the task's own below it."""
    found = setting.airflow.api.call("GET", f"dags/boxed/dagRuns/{run_id}/taskInstances/{task}")
    workers = [p for p in psutil.process_iter(["cmdline"]) if found["id"] in " ".join(p.info["cmdline"] or ())]
    assert len(workers) == 2, workers
    for process in workers:
        process.send_signal(signal.SIGKILL)


def manifests(root: str) -> list[dict[str, Any]]:
    store = open_store(root)
    found = [e.path for e in store.list("artifacts") if e.path.endswith("_manifest.json")]
    return [json.loads(store.read(path).data) for path in found]


def production(root: str) -> tuple[str, str]:
    """The version in production, and the run that published it."""
    store = open_store(root)
    alias, _ = registry.alias(store, "boxed", registry.PRODUCTION)
    assert alias is not None
    release = registry.read_release(store, "boxed", alias.version, sha256=alias.manifest_sha256)
    return release.version, release.provenance["run_id"]


def test_a_run_whose_container_is_stopped_and_whose_worker_is_killed_ends_with_the_keys_of_any_runtime(
    setting: Setting, tmp_path: Path
) -> None:
    run_id = setting.start(**{"train.max_steps": STEPS_OF_A_LONG_RUN})
    made = setting.plan_of(run_id)
    with Watcher(setting.engine, "train_qlora") as watcher:
        setting.engine("kill", "--signal", "TERM", setting.training(made))
        setting.until(lambda: "try again (75)" in setting.log(run_id, "train_qlora", 1))
        setting.until(lambda: "going on from" in setting.log(run_id, "train_qlora", 2), 120)
        (second,) = setting.engine.names(made.step("train_qlora").key[:12])
        with frozen(setting, second):
            kill_worker(setting, run_id, "train_qlora")
            setting.until(lambda: "runs already: following it" in setting.log(run_id, "train_qlora", 3), 120)
        state = setting.airflow.api.wait("boxed", run_id, seconds=600)
    assert state == "success", [
        setting.log(run_id, t.name, t.tries) for t in setting.airflow.api.tasks("boxed", run_id)
    ]
    assert watcher.most_at_once == 1, "a second container ran beside the first"
    assert len(watcher.ids) == 2, "one for the first try, and one for the second and the third"
    (resumed,) = re.findall(
        r"going on from scratch/train_qlora/\S+checkpoint-(\d+)", setting.log(run_id, "train_qlora", 2)
    )
    assert 0 < int(resumed) < STEPS_OF_A_LONG_RUN
    assert execute.summary(made, "train_qlora")["steps"] == STEPS_OF_A_LONG_RUN

    elsewhere = plan.make(setting.config, tmp_path.as_uri(), overrides=[f"train.max_steps={STEPS_OF_A_LONG_RUN}"])
    found = manifests(setting.root)
    assert {m["step"]: m["key"] for m in found} == {step.name: step.key for step in elsewhere.steps}
    images = {m["provenance"]["image"].partition(":")[0] for m in found}
    assert images == {"qlora-retrain-light", "qlora-retrain-train"}
    assert production(setting.root)[1] == made.run_id
    assert setting.engine.names(made.run_id) == []


def test_kfps_own_runner_runs_the_whole_pipeline_with_the_same_keys_and_shows_its_reports(
    setting: Setting, tmp_path: Path
) -> None:
    root, outputs = "s3://models/kubeflow", setting.written / "outputs"
    setting.root, before = root, setting.root
    try:
        process = setting.kfp("run", setting.config, "--outputs", outputs)
        assert process.wait(600) == 0, setting.said()
    finally:
        setting.root = before
    elsewhere = plan.make(setting.config, tmp_path.as_uri())
    assert {m["step"]: m["key"] for m in manifests(root)} == {step.name: step.key for step in elsewhere.steps}
    assert f"Published {production(root)[0]}, promoted to production." in setting.said()
    shown = {path.relative_to(outputs).parts[2:]: path.read_text() for path in outputs.rglob("*") if path.is_file()}
    for step in ("validate-data", "train-qlora", "evaluate", "merge-adapter"):
        assert shown[step, "report"].startswith("<!doctype html>")
    assert shown["summary", "report"] == shown["evaluate", "report"]
    assert f"Published {production(root)[0]}" in shown["summary", "page"]
    assert "train_qlora" in shown["plan", "report"]
    numbers = json.loads(shown["train-qlora", "executor_output.json"])["artifacts"]["numbers"]["artifacts"][0][
        "metadata"
    ]
    assert numbers["steps"] == 10 * math.ceil(246 / 16)  # epochs, rows and batch of the line
    assert setting.of_kfp() == []


def test_a_run_that_airflow_began_and_lost_in_training_is_finished_by_kubeflow(setting: Setting) -> None:
    run_id = setting.start(**{"train.max_steps": STEPS_OF_A_LONG_RUN, "train.learning_rate": 4e-3})
    made = setting.plan_of(run_id)
    setting.engine("kill", setting.training(made))  # as a machine that is gone: nothing is saved any more
    setting.airflow.api.end("boxed", run_id)
    setting.until(lambda: setting.engine.names(made.run_id) == [])
    assert execute.manifest(made, "train_qlora") is None
    process = setting.kfp("run", setting.config, "--plan", made.uri)
    assert process.wait(600) == 0, setting.said()
    assert "going on from scratch/train_qlora/" in setting.said()
    assert "validate_data: dataset" in setting.said(), "found made, by Airflow"
    assert production(setting.root)[1] == made.run_id


def test_a_run_that_kubeflow_began_and_that_was_stopped_in_training_is_finished_by_airflow(setting: Setting) -> None:
    changed = [f"train.max_steps={STEPS_OF_A_LONG_RUN}", "train.learning_rate=3e-3"]
    process = setting.kfp("run", setting.config, *(word for item in changed for word in ("--set", item)))
    setting.until(lambda: re.search(r"^ *plan (s3://\S+)$", setting.said(), re.MULTILINE), 120)
    (uri,) = set(re.findall(r"^ *plan (s3://\S+)$", setting.said(), re.MULTILINE))
    made = Plan.load(uri)
    setting.checkpoint(made)
    process.terminate()
    assert process.wait(120) == 130
    assert setting.of_kfp() == [], "stopped, after it had saved"
    run_id = setting.start(plan_uri=uri)
    assert setting.airflow.api.wait("boxed", run_id, seconds=600) == "success"
    log = setting.log(run_id, "train_qlora")
    assert "going on from scratch/train_qlora/" in log
    assert production(setting.root)[1] == made.run_id


def test_no_secret_of_any_channel_is_anywhere_afterwards(
    setting: Setting, canaries: dict[str, str], tmp_path: Path
) -> None:
    """A run that is refused, in each orchestrator; then everything that was ever written is searched."""
    with Watcher(setting.engine, "validate_data") as watcher:
        run_id = setting.start(**{"data.max_quarantined": 0.01, "train.max_steps": 1})
        state = setting.airflow.api.wait("boxed", run_id, seconds=300)
    assert state == "failed", "one step of training cannot pass"
    process = setting.kfp("run", setting.config, "--set", "train.max_steps=1")
    assert process.wait(300) == 11, setting.said()
    package = setting.written / "retrain.yaml"
    done = subprocess.run([KFP, "kfp", "compile", "--out", package], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(package.read_text()))) == 2

    client = boto3.client("s3")
    texts = {"inspect": "".join(watcher.inspected)}
    for folder in (setting.airflow.home, setting.written):
        texts |= {
            str(path): path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file()
        }
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for item in page["Contents"]:
            body = client.get_object(Bucket="models", Key=item["Key"])["Body"].read()
            texts[item["Key"]] = body.decode("utf-8", "replace")
    encoded = {name: base64.b64encode(secret.encode()).decode().rstrip("=")[:-1] for name, secret in canaries.items()}
    leaks = [
        (name, where)
        for where, text in texts.items()
        for name, secret in canaries.items()
        if secret in text or encoded[name] in text
    ]
    assert leaks == []
    # The search is no empty one: it covers the database, the logs of tasks, containers, plans and manifests.
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
