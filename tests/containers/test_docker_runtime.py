"""The docker runtime's operator on a real engine: one step, or a program in its place, confined like every step."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.pipeline import make_plan, status
from qlora_retrain.pipeline.plan import Plan

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
CONFINEMENT = {
    "uid": 10001,
    "gid": 10001,
    "CapEff": "0" * 16,
    "CapBnd": "0" * 16,
    "NoNewPrivs": "1",
    "Seccomp": "2",
    "writable": ["/tmp", "/workspace"],
    "secrets": [],
}


@pytest.fixture(scope="module")
def config(make_line: Callable[..., Path]) -> Path:
    return make_line()


@pytest.fixture
def plan(s3: str, images: None, config: Path) -> Plan:
    """Make a plan, whose steps the tests run one by one."""
    return make_plan.make_plan(config, f"{s3}/{uuid.uuid4().hex}")


@pytest.fixture
def make_task(engine: Engine, config: Path) -> Iterator[Callable[..., Any]]:
    """Make the task of a step; afterwards remove what the test left on the engine."""

    def make(name: str = "validate_data", url: str = engine.url, **runtime: object) -> Any:
        from qlora_retrain.runtimes.airflow.docker import DockerStepOperator

        settings = RuntimeConfig.model_validate({"kind": "docker", "network": "host", "memory_gib": 8, **runtime})
        return DockerStepOperator(task_id=name, step=name, line="boxed", runtime=settings, docker_url=url)

    yield make
    engine.remove_everything()


@pytest.fixture
def run_program_instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let containers run a program instead of their step; they are confined in the same way."""
    from qlora_retrain.runtimes.docker import container_spec

    def replace_command(program: str) -> None:
        monkeypatch.setattr(
            container_spec, "step_command", lambda step, uri: ["python", "-c", textwrap.dedent(program)]
        )

    return replace_command


@pytest.fixture(autouse=True)
def own_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `task_context` say which store is Airflow's, until the test ends."""
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", "set by task_context")


def task_context(plan: Plan, try_number: int = 1) -> dict[str, Any]:
    os.environ["QLORA_RETRAIN_ROOT"] = plan.root
    dag_run = SimpleNamespace(dag_id="boxed", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    task = SimpleNamespace(try_number=try_number, xcom_pull=lambda task_ids: {"plan": plan.uri}[task_ids])
    return {"dag_run": dag_run, "params": {"resume_run": plan.run_id}, "ti": task}


def test_a_step_sees_a_read_only_root_and_has_no_capability(
    plan: Plan,
    run_program_instead: Callable[[str], None],
    make_task: Callable[..., Any],
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-this-test")
    run_program_instead("""
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
            "writable": [p for p in ("/", "/app", "/opt/venv", "/etc", "/tmp", "/workspace") if writable(p)],
            "secrets": [name for name, value in os.environ.items() if "canary" in value],
        }))
        sys.exit(12)
    """)
    with pytest.raises(AirflowFailException) as caught:
        make_task().execute(task_context(plan))
    assert json.loads(str(caught.value).partition(": ")[2]) == CONFINEMENT
    assert engine.names(plan.run_id) == []


def test_a_step_that_takes_too_much_memory_is_killed_and_the_limit_is_named(
    plan: Plan, run_program_instead: Callable[[str], None], make_task: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    run_program_instead("held = [bytearray(2**20) for _ in range(1000)]")
    with pytest.raises(AirflowException, match=r"\(137\).*runtime\.memory_gib is 0\.1") as caught:
        make_task(memory_gib=0.1).execute(task_context(plan))
    assert not isinstance(caught.value, AirflowFailException), "it may be tried again"


# It runs until a task has adopted its container: `adopting_task` says so to it.
PROGRAM_TO_ADOPT = """
import os, sys, time
print("ready", flush=True)
for _ in range(5000):
    if os.path.exists("/tmp/adopted"):
        break
    time.sleep(0.1)
print("the first one ended")
sys.exit(12)
"""


def adopting_task(make_task: Callable[..., Any], engine: Engine) -> Any:
    """Make a task that lets `PROGRAM_TO_ADOPT` end as soon as it has adopted the container."""
    task = make_task()
    adopt = task._adopt_running_container

    def adopt_and_tell() -> str | None:
        container_id: str | None = adopt()
        if container_id is not None:
            engine("exec", container_id, "touch", "/tmp/adopted")
        return container_id

    task._adopt_running_container = adopt_and_tell
    return task


def test_a_second_try_follows_the_container_that_the_first_left(
    plan: Plan, run_program_instead: Callable[[str], None], make_task: Callable[..., Any], engine: Engine
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from qlora_retrain.runtimes.airflow.docker import step_container_name

    run_program_instead(PROGRAM_TO_ADOPT)
    # The first task starts its container, and its worker dies before it can follow it.
    first = make_task()
    first.container_name = step_container_name(plan, "validate_data")
    first.cli.start(first._create_step_container(plan))
    first.cli.close()

    run_program_instead("print('a second one')")
    with pytest.raises(AirflowFailException, match="the first one ended"):
        adopting_task(make_task, engine).execute(task_context(plan, try_number=2))
    assert engine.names(plan.run_id) == []


def run_in_thread(run: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Start it in a thread; an exception that it raises is in the list once the thread has ended."""
    errors: list[BaseException] = []

    def execute() -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - the test checks it
            errors.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    return thread, errors


def test_killing_the_task_lets_the_step_save_and_leaves_no_container(
    plan: Plan,
    run_program_instead: Callable[[str], None],
    make_task: Callable[..., Any],
    engine: Engine,
    wait_until: Callable[..., None],
) -> None:
    run_program_instead("""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(7), print("saved", flush=True), sys.exit(75)))
        print("ready", flush=True)
        time.sleep(60)
    """)
    task = make_task()
    thread, errors = run_in_thread(lambda: task.execute(task_context(plan)))
    wait_until(lambda: engine.names(plan.run_id) and "ready" in engine("logs", engine.names(plan.run_id)[0]))

    task.on_kill()
    thread.join(300)
    (error,) = errors
    assert str(error).startswith("try again (75)")
    assert ": saved" in str(error).splitlines()[0], "its last output, although the container was being removed"
    assert task._cleanup_process.wait(300) == 0
    assert engine.names(plan.run_id) == []


# docker-py does not close its socket where it cannot connect.
leaks_a_socket = pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")


@leaks_a_socket
def test_an_engine_that_does_not_answer_is_named_and_tried_again(
    plan: Plan, make_task: Callable[..., Any], tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException, match=r"the container engine at unix://.*none\.sock failed") as caught:
        make_task(url=f"unix://{tmp_path}/none.sock").execute(task_context(plan))
    assert not isinstance(caught.value, AirflowFailException)


@leaks_a_socket
def test_an_engine_that_stops_under_a_running_step_is_named_and_the_next_try_follows_the_same_container(
    plan: Plan,
    run_program_instead: Callable[[str], None],
    make_task: Callable[..., Any],
    engine: Engine,
    wait_until: Callable[..., None],
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    run_program_instead(PROGRAM_TO_ADOPT)
    thread, errors = run_in_thread(lambda: make_task().execute(task_context(plan)))
    wait_until(lambda: engine.names(plan.run_id) and "ready" in engine("logs", engine.names(plan.run_id)[0]))

    engine.stop()
    thread.join(300)
    try:
        (error,) = errors
        assert isinstance(error, AirflowException)
        assert not isinstance(error, AirflowFailException), "it may be tried again"
        assert f"the container engine at {engine.url} failed" in str(error)
    finally:
        engine.start()

    with pytest.raises(AirflowFailException, match="the first one ended"):
        adopting_task(make_task, engine).execute(task_context(plan, try_number=2))
    assert engine.names(plan.run_id) == []


@pytest.fixture
def store_of_images_user(tmp_path: Path, make_line: Callable[..., Path]) -> Path:
    """Make a folder for a store that belongs to the images' user, since these tests run as root."""
    folder = tmp_path / "store"
    folder.mkdir()
    subprocess.run(["chown", "10001:10001", folder], check=True)
    for readable in (*tmp_path.parents[:2], tmp_path):
        readable.chmod(0o755)
    return folder


def test_steps_work_without_a_network_on_inputs_that_are_staged(
    store_of_images_user: Path, images: None, config: Path, make_task: Callable[..., Any]
) -> None:
    plan = make_plan.make_plan(config, store_of_images_user.as_uri(), overrides=["train.max_steps=20"])
    subprocess.run(["chown", "-R", "10001:10001", store_of_images_user], check=True)
    for name in ("validate_data", "quantize_model", "train_qlora"):
        make_task(name, network="none").execute(task_context(plan))
        assert status.exit_code(plan, name) == 0
    assert status.numbers(plan, "train_qlora")["steps"] == 20
    assert {path.stat().st_uid for path in (store_of_images_user / "artifacts").rglob("*")} == {10001}


def test_a_store_that_belongs_to_root_is_refused_since_the_container_would_have_to_be_root(
    tmp_path: Path, config: Path, make_task: Callable[..., Any], images: None
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    plan = make_plan.make_plan(config, (tmp_path / "store").as_uri())
    with pytest.raises(AirflowFailException, match="must not run as root: chown the folder to another user"):
        make_task().execute(task_context(plan))


def test_a_container_that_was_removed_is_not_waited_for(
    plan: Plan,
    run_program_instead: Callable[[str], None],
    make_task: Callable[..., Any],
    engine: Engine,
    wait_until: Callable[..., None],
) -> None:
    run_program_instead("import time; print('ready', flush=True); time.sleep(2000)")
    thread, errors = run_in_thread(lambda: make_task().execute(task_context(plan)))
    wait_until(lambda: engine.names(plan.run_id) and "ready" in engine("logs", engine.names(plan.run_id)[0]))

    engine("rm", "-f", engine.names(plan.run_id)[0])
    thread.join(300)
    assert not thread.is_alive()
    (error,) = errors
    assert str(error).startswith("try again (75)") or "(137)" in str(error), (
        "stopped from outside: it may be tried again"
    )


def test_a_task_that_is_interrupted_while_it_follows_a_log_leaves_no_connection(
    plan: Plan,
    run_program_instead: Callable[[str], None],
    make_task: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout

    def time_out(lines: Iterator[str]) -> str:
        assert next(lines) == "ready"
        raise AirflowTaskTimeout

    run_program_instead("import time; print('ready', flush=True); time.sleep(60)")
    task = make_task()
    monkeypatch.setattr(task, "copy_output", time_out)
    sockets_before = open_unix_sockets()
    gc.disable()  # otherwise garbage collection might close a leaked connection before it is counted
    try:
        with pytest.raises(AirflowFailException, match=r"\(12\): stopped at its deadline"):
            task.execute(task_context(plan))
        assert open_unix_sockets() == sockets_before
    finally:
        gc.enable()


def open_unix_sockets() -> int:
    """Count this process's Unix sockets, which is what an engine is connected by."""
    return len(psutil.Process().net_connections("unix"))
