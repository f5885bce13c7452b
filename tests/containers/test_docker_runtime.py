"""The docker runtime on a real engine, through Airflow's own scheduler and by itself."""

from __future__ import annotations

import json
import subprocess
import textwrap
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import yaml

from qlora_retrain import plan
from qlora_retrain.config.load import load
from qlora_retrain.plan import Plan
from qlora_retrain.runtimes.embedded import EmbeddedAirflow

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
LINE = {
    "line": "boxed",
    "data": {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256},
    "train": {"learning_rate": 1e-2, "epochs": 4, "batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"first_release": True, "min_gain_over_base": 0.1, "bootstrap_samples": 500},
    "merge": {"max_loss_nats": 0.5},
    "runtime": {"kind": "docker", "network": "host", "memory_gib": 8},
}


@pytest.fixture
def write_line(tmp_path: Path, tickets: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write the line into a folder of its own, with sections changed; sources readable by the images' user."""
    for folder in (*tmp_path.parents[:2], tmp_path, *tiny_model.parents[:2], tiny_model):
        folder.chmod(0o755)
    for file in tiny_model.iterdir():
        file.chmod(0o644)

    def write(**changes: dict[str, object]) -> Path:
        document: dict[str, Any] = {**LINE, "sources": {"raw_data": str(tickets), "base_model": str(tiny_model)}}
        for section, values in changes.items():
            document[section] = {**document[section], **values}
        path = tmp_path / "pipelines" / "boxed.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(document))
        return path

    return write


def running() -> list[str]:
    """The names of this project's containers, running or not."""
    command = ["podman", "ps", "-a", "--filter", "label=qlora-retrain.step", "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def airflow_step(made: Plan, config: Path, engine: str, step: str, **runtime: object) -> Any:
    from qlora_retrain.runtimes.airflow_docker import DockerStepOperator

    section = load(config).runtime.model_copy(update=runtime)
    return DockerStepOperator(task_id=step, step=step, line="boxed", runtime=section, docker_url=engine)


@pytest.fixture
def made(s3: str, images: None, write_line: Callable[..., Path]) -> Plan:
    """A plan whose steps can be run one by one."""
    return plan.make(write_line(), f"{s3}/{uuid.uuid4().hex}")


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have containers run a program instead of their step: confined in the same way, and short."""
    from qlora_retrain.runtimes import containers

    def say(program: str) -> None:
        monkeypatch.setattr(containers, "command", lambda step, uri: ["python", "-c", textwrap.dedent(program)])

    return say


def context(made: Plan, tries: int = 1) -> dict[str, Any]:
    run = SimpleNamespace(dag_id="boxed", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    return {"dag_run": run, "params": {"plan_uri": made.uri}, "ti": SimpleNamespace(try_number=tries)}


def test_a_run_through_airflow_publishes_with_the_keys_of_any_runtime(
    engine: str, images: None, s3: str, write_line: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_line()
    environment = {"QLORA_RETRAIN_ROOT": s3, "QLORA_RETRAIN_PIPELINES": str(config.parent), "DOCKER_HOST": engine}
    with EmbeddedAirflow(tmp_path / "home", environment=environment) as airflow:
        airflow.wait_for_dag("boxed")
        airflow.api.unpause("boxed")
        run_id = airflow.api.trigger("boxed")
        state = airflow.api.wait("boxed", run_id, seconds=900)
        logs = {
            t.name: "\n".join(airflow.api.log("boxed", run_id, t.name, t.tries))
            for t in airflow.api.tasks("boxed", run_id)
        }
    assert state == "success", logs

    client = boto3.client("s3")
    stored = {item["Key"] for item in client.list_objects_v2(Bucket="models", Prefix="team/artifacts/")["Contents"]}
    manifests = [
        json.loads(client.get_object(Bucket="models", Key=k)["Body"].read()) for k in stored if "_manifest" in k
    ]
    keys = {m["step"]: m["key"] for m in manifests}
    elsewhere = plan.make(config, (tmp_path / "local").as_uri())
    assert keys == {step.name: step.key for step in elsewhere.steps}
    assert {m["provenance"]["image"].partition(":")[0] for m in manifests} == {
        "qlora-retrain-light",
        "qlora-retrain-train",
    }
    assert running() == []

    everything = [*logs.values(), *(p.read_text(errors="replace") for p in (tmp_path / "home").rglob("*.log"))]
    everything += [
        client.get_object(Bucket="models", Key=item["Key"])["Body"].read().decode("utf-8", "replace")
        for item in client.list_objects_v2(Bucket="models")["Contents"]
    ]
    everything.append((tmp_path / "home" / "airflow.db").read_bytes().decode("utf-8", "replace"))
    assert not [text for text in everything if "canary-do-not-leak" in text]


def test_a_step_sees_a_read_only_root_and_has_no_power(
    made: Plan, says: Callable[[str], None], engine: str, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    says("""
        import json, os, sys
        status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
        def writable(path):
            try:
                open(path + "/probe", "w").close()
            except OSError:
                return False
            return True
        print(json.dumps({
            "uid": os.getuid(), "gid": os.getgid(),
            **{name: status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")},
            "writable": [p for p in ("/", "/app", "/opt/venv", "/etc", "/tmp", "/work") if writable(p)],
            "secrets": [name for name, value in os.environ.items() if "canary" in value],
        }))
        sys.exit(12)
    """)
    with pytest.raises(AirflowFailException) as caught:
        airflow_step(made, tmp_path / "pipelines/boxed.yaml", engine, "validate_data").execute(context(made))
    told = json.loads(str(caught.value).partition(": ")[2])
    assert told == {
        "uid": 10001,
        "gid": 10001,
        "CapEff": "0" * 16,
        "CapBnd": "0" * 16,
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "writable": ["/tmp", "/work"],
        "secrets": [],
    }
    assert running() == []


def test_a_step_that_takes_too_much_memory_is_killed_and_the_limit_is_named(
    made: Plan, says: Callable[[str], None], engine: str, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    says("held = [bytearray(2**20) for _ in range(1000)]")
    step = airflow_step(made, tmp_path / "pipelines/boxed.yaml", engine, "validate_data", memory_gib=0.1)
    with pytest.raises(AirflowException, match=r"\(137\).*runtime\.memory_gib is 0\.1") as caught:
        step.execute(context(made))
    assert not isinstance(caught.value, AirflowFailException), "it may be tried again"


def test_a_second_try_follows_the_container_that_the_first_left(
    made: Plan, says: Callable[[str], None], engine: str, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    says("import sys, time; time.sleep(5); print('the first one ended'); sys.exit(12)")
    config = tmp_path / "pipelines/boxed.yaml"
    first = airflow_step(made, config, engine, "validate_data")
    from qlora_retrain.runtimes.airflow_docker import name_of

    first.container_name = name_of(made, "validate_data")
    first.cli.start(first._created(made))  # and then its worker is killed
    says("print('a second one')")
    with pytest.raises(AirflowFailException, match="the first one ended"):
        airflow_step(made, config, engine, "validate_data").execute(context(made, tries=2))
    assert running() == []


def test_killing_the_task_lets_the_step_save_and_leaves_no_container(
    made: Plan, says: Callable[[str], None], engine: str, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowException

    says("""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(7), print("saved", flush=True), sys.exit(75)))
        time.sleep(60)
    """)
    step = airflow_step(made, tmp_path / "pipelines/boxed.yaml", engine, "validate_data")
    caught: list[BaseException] = []

    def execute() -> None:
        try:
            step.execute(context(made))
        except AirflowException as error:
            caught.append(error)

    task = threading.Thread(target=execute)
    task.start()
    until(lambda: running() != [])
    time.sleep(3)  # its handler is there
    step.on_kill()
    task.join(60)
    assert "try again (75): saved" in str(caught)
    assert step._sweep.wait(60) == 0
    assert running() == []


def test_an_engine_that_does_not_answer_is_named_and_tried_again(made: Plan, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    nowhere = f"unix://{tmp_path}/none.sock"
    step = airflow_step(made, tmp_path / "pipelines/boxed.yaml", nowhere, "validate_data")
    with pytest.raises(AirflowException, match=r"the container engine at unix://.*none\.sock failed") as caught:
        step.execute(context(made))
    assert not isinstance(caught.value, AirflowFailException)


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)
