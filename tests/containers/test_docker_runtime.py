"""The docker runtime's operator on a real engine: one step, or a program in its place, confined as every step is."""

from __future__ import annotations

import gc
import json
import subprocess
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from qlora_retrain.config.line import load
from qlora_retrain.pipeline import execute as runner
from qlora_retrain.pipeline import plan
from qlora_retrain.pipeline.plan import Plan

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
CONFINED = {
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
def made(s3: str, images: None, config: Path) -> Plan:
    """A plan whose steps can be run one by one."""
    return plan.make(config, f"{s3}/{uuid.uuid4().hex}")


@pytest.fixture
def step(engine: Engine, config: Path) -> Iterator[Callable[..., Any]]:
    """Make the task of a step; whatever a test leaves on the engine is removed."""

    def make(name: str = "validate_data", url: str = engine.url, **runtime: object) -> Any:
        from qlora_retrain.runtimes.airflow.docker import DockerStepOperator

        section = load(config).runtime.model_copy(update=runtime)
        return DockerStepOperator(task_id=name, step=name, line="boxed", runtime=section, docker_url=url)

    yield make
    engine.sweep()


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have containers run a program instead of their step: confined in the same way, and short."""
    from qlora_retrain.runtimes.docker import container_spec

    def say(program: str) -> None:
        monkeypatch.setattr(container_spec, "command", lambda step, uri: ["python", "-c", textwrap.dedent(program)])

    return say


def context(made: Plan, tries: int = 1) -> dict[str, Any]:
    run = SimpleNamespace(dag_id="boxed", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    return {"dag_run": run, "params": {"plan_uri": made.uri}, "ti": SimpleNamespace(try_number=tries)}


def test_a_step_sees_a_read_only_root_and_has_no_power(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-this-test")
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
            "writable": [p for p in ("/", "/app", "/opt/venv", "/etc", "/tmp", "/workspace") if writable(p)],
            "secrets": [name for name, value in os.environ.items() if "canary" in value],
        }))
        sys.exit(12)
    """)
    with pytest.raises(AirflowFailException) as caught:
        step().execute(context(made))
    assert json.loads(str(caught.value).partition(": ")[2]) == CONFINED
    assert engine.names() == []


def test_a_step_that_takes_too_much_memory_is_killed_and_the_limit_is_named(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    says("held = [bytearray(2**20) for _ in range(1000)]")
    with pytest.raises(AirflowException, match=r"\(137\).*runtime\.memory_gib is 0\.1") as caught:
        step(memory_gib=0.1).execute(context(made))
    assert not isinstance(caught.value, AirflowFailException), "it may be tried again"


def test_a_second_try_follows_the_container_that_the_first_left(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any], engine: Engine
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from qlora_retrain.runtimes.airflow.docker import name_of

    says("import sys, time; time.sleep(5); print('the first one ended'); sys.exit(12)")
    first = step()
    first.container_name = name_of(made, "validate_data")
    first.cli.start(first._created(made))  # and then its worker is killed
    first.cli.close()
    says("print('a second one')")
    with pytest.raises(AirflowFailException, match="the first one ended"):
        step().execute(context(made, tries=2))
    assert engine.names() == []


def in_a_thread(run: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Start it; what it raises is in the list when the thread has ended."""
    caught: list[BaseException] = []

    def execute() -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            caught.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    return thread, caught


def test_killing_the_task_lets_the_step_save_and_leaves_no_container(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any], engine: Engine, until: Callable[..., None]
) -> None:
    says("""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(7), print("saved", flush=True), sys.exit(75)))
        print("ready", flush=True)
        time.sleep(60)
    """)
    task = step()
    thread, caught = in_a_thread(lambda: task.execute(context(made)))
    until(lambda: engine.names() and "ready" in engine("logs", engine.names()[0]))
    task.on_kill()
    thread.join(60)
    (error,) = caught
    assert str(error).startswith("try again (75)")
    assert str(error).endswith("saved"), "what it said last, though it was being removed"
    assert task._sweep.wait(60) == 0
    assert engine.names() == []


# Where docker-py finds no engine it leaves a socket to the garbage.
loses_a_socket = pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")


@loses_a_socket
def test_an_engine_that_does_not_answer_is_named_and_tried_again(
    made: Plan, step: Callable[..., Any], tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException, match=r"the container engine at unix://.*none\.sock failed") as caught:
        step(url=f"unix://{tmp_path}/none.sock").execute(context(made))
    assert not isinstance(caught.value, AirflowFailException)


@loses_a_socket
def test_an_engine_that_stops_under_a_running_step_is_named_and_the_next_try_follows_the_same_container(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any], engine: Engine, until: Callable[..., None]
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    says("import sys, time; print('ready', flush=True); time.sleep(12); print('the same one ended'); sys.exit(12)")
    thread, caught = in_a_thread(lambda: step().execute(context(made)))
    until(lambda: engine.names() and "ready" in engine("logs", engine.names()[0]))
    engine.stop()
    thread.join(30)
    try:
        (error,) = caught
        assert isinstance(error, AirflowException)
        assert not isinstance(error, AirflowFailException), "it may be tried again"
        assert f"the container engine at {engine.url} failed" in str(error)
    finally:
        engine.start()
    with pytest.raises(AirflowFailException, match="the same one ended"):
        step().execute(context(made, tries=2))
    assert engine.names() == []


@pytest.fixture
def own_store(tmp_path: Path, make_line: Callable[..., Path]) -> Path:
    """A folder for a store that belongs to the images' user, as on a machine where nothing runs as root."""
    folder = tmp_path / "store"
    folder.mkdir()
    subprocess.run(["chown", "10001:10001", folder], check=True)
    for readable in (*tmp_path.parents[:2], tmp_path):
        readable.chmod(0o755)
    return folder


def test_steps_work_without_a_network_on_inputs_that_are_staged(
    own_store: Path, images: None, config: Path, step: Callable[..., Any]
) -> None:
    made = plan.make(config, own_store.as_uri(), overrides=["train.max_steps=20"])
    subprocess.run(["chown", "-R", "10001:10001", own_store], check=True)
    for name in ("validate_data", "quantize_model", "train_qlora"):
        step(name, network="none").execute(context(made))
        assert runner.found(made, name) == 0
    assert runner.summary(made, "train_qlora")["steps"] == 20
    assert {path.stat().st_uid for path in (own_store / "artifacts").rglob("*")} == {10001}


def test_a_store_that_belongs_to_root_is_refused_since_the_container_would_have_to_be_root(
    tmp_path: Path, config: Path, step: Callable[..., Any], images: None
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    made = plan.make(config, (tmp_path / "store").as_uri())
    with pytest.raises(AirflowFailException, match="must not run as root: give the folder to another user"):
        step().execute(context(made))


def test_a_container_that_is_there_no_more_is_not_waited_for(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any], engine: Engine, until: Callable[..., None]
) -> None:
    says("import time; print('ready', flush=True); time.sleep(60)")
    thread, caught = in_a_thread(lambda: step().execute(context(made)))
    until(lambda: engine.names() and "ready" in engine("logs", engine.names()[0]))
    clock = time.monotonic()
    engine("rm", "-f", engine.names()[0])
    thread.join(60)
    assert time.monotonic() - clock < 30
    (error,) = caught
    assert str(error).startswith("try again (75)") or "(137)" in str(error), (
        "stopped from outside: it may be tried again"
    )


def test_a_task_that_is_interrupted_while_it_follows_a_log_leaves_no_connection(
    made: Plan, says: Callable[[str], None], step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowTaskTimeout

    def time_out(lines: Iterator[str]) -> str:
        assert next(lines) == "ready"
        raise AirflowTaskTimeout

    says("import time; print('ready', flush=True); time.sleep(60)")
    task = step()
    monkeypatch.setattr(task, "last_lines", time_out)
    before = connections()
    gc.disable()  # what is open is seen, and not what garbage was collected in time
    try:
        with pytest.raises(AirflowTaskTimeout):
            task.execute(context(made))
        assert connections() == before
    finally:
        gc.enable()


def connections() -> int:
    """This process's sockets of an engine's kind."""
    return len(psutil.Process().net_connections("unix"))
