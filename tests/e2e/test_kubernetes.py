"""The whole pipeline as pods, run by a real Airflow: scheduler, triggerer, and Kubernetes' API over HTTP.

The test plays the kubelet: it runs every pod's command line. In the middle of the run it clears a task that waits for
its pod. Then it kills the scheduler and the triggerer, and evicts the pod while neither runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.storage import open_store
from tests.runtimes.kubernetes import canaries

if TYPE_CHECKING:
    from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
    from tests.runtimes.kubernetes.cluster import FakeCluster
    from tests.zygote import Zygote

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
LINE = {
    "line": "pods",
    "data": {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 10, "micro_batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {
        "allow_first_release": True,
        "min_gain_over_base": 0.1,
        "bootstrap_samples": 500,
        "max_loss_to_champion": 1,
    },
    "merge": {"max_loss_increase_nats": 0.5, "min_prompts": 10},
}


class Kubelet:
    """Run the command line of every pod, one after the other; hold pods that train until `evict` is set."""

    def __init__(self, cluster: FakeCluster, zygote: Zygote) -> None:
        self.cluster, self.zygote = cluster, zygote
        self.steps_run: list[str] = []
        self.held_pod_uid = ""  # of the training pod that is waiting for `evict`
        self.evict = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run_new_pods)

    def __enter__(self) -> Kubelet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.evict.set()
        self._thread.join()

    def _run_new_pods(self) -> None:
        while not self._stop.wait(0.3):
            for pod in self.cluster.pods():
                if "containerStatuses" not in pod["status"]:
                    self._run(pod)

    def _run(self, pod: dict[str, Any]) -> None:
        name, step = pod["metadata"]["name"], pod["metadata"]["labels"]["qlora-retrain.step"]
        self.steps_run.append(step)
        self._set_container_state(name, {"running": {"startedAt": "2026-01-31T03:00:00Z"}}, phase="Running")
        if step == "train_qlora" and not self.evict.is_set():
            self.held_pod_uid = pod["metadata"]["uid"]
            while not self.evict.wait(0.3):
                if self.held_pod_uid not in [
                    pod_in_cluster["metadata"]["uid"] for pod_in_cluster in self.cluster.pods()
                ]:
                    return  # it was deleted
            container_state = {"terminated": {"exitCode": 137, "reason": "Error"}}
            self._set_container_state(
                name, container_state, phase="Failed", reason="Evicted", message="The node was low on resource: memory."
            )
            return

        container = pod["spec"]["containers"][0]
        variables = {
            v["name"]: v["value"] for v in container["env"] if not v["value"].startswith(("/workspace", "/tmp"))
        }
        process = self.zygote.popen(
            [sys.executable, *container["args"][1:]],
            env={**os.environ, **variables},
            cwd=project_root(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.cluster.emulator.logs[name], _ = process.communicate()
        terminated = {"exitCode": process.returncode, "reason": "Error" if process.returncode else "Completed"}
        self._set_container_state(
            name, {"terminated": terminated}, phase="Failed" if process.returncode else "Succeeded"
        )

    def _set_container_state(self, name: str, state: dict[str, Any], **status: Any) -> None:
        image = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}
        scheduled = [{"type": "PodScheduled", "status": "True"}]
        statuses = [{"name": "base", "state": state, **image}]
        self.cluster.set_status(name, containerStatuses=statuses, conditions=scheduled, **status)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeCluster]:
    from tests.runtimes.kubernetes.cluster import running_cluster

    yield from running_cluster(tmp_path)


@pytest.fixture
def airflow(
    cluster: FakeCluster, tmp_path: Path, tiny_model: Path, write_tickets: Callable[[Path, int], Path]
) -> Iterator[StandaloneAirflow]:
    from qlora_retrain.demo.standalone_airflow import StandaloneAirflow

    tickets = write_tickets(tmp_path / "tickets.jsonl", 300)
    document = {**LINE, "sources": {"raw_data": str(tickets), "base_model": str(tiny_model)}}
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "pods.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "platform.yaml").write_text("runtime: {kind: kubernetes}\n")
    environment = {
        "QLORA_RETRAIN_PLATFORM": str(tmp_path / "platform.yaml"),
        "QLORA_RETRAIN_ROOT": (tmp_path / "store").as_uri(),
        "QLORA_RETRAIN_PIPELINES": str(tmp_path / "pipelines"),
        "QLORA_RETRAIN_PROFILE": str(project_root() / "manifests" / "profiles" / "gpu.yaml"),
        "KUBECONFIG": str(cluster.kubeconfig),
        **canaries.environment(tmp_path),
        # Airflow notices a killed triggerer after 5 seconds instead of 30.
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "5",
        "OMP_NUM_THREADS": "1",
    }
    with StandaloneAirflow(tmp_path / "home", environment=environment) as airflow:
        airflow.wait_for_dag("pods")
        airflow.api.unpause("pods")
        yield airflow


def start_triggerer(airflow: StandaloneAirflow) -> subprocess.Popen[bytes]:
    """Start a triggerer; StandaloneAirflow has none, because only Kubernetes' tasks are deferred."""
    with (airflow.home / f"triggerer-{time.monotonic_ns()}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "airflow", "triggerer", "--skip-serve-logs"],
            env=airflow._environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_scheduler(airflow: StandaloneAirflow) -> None:
    """SIGKILL the scheduler, its executor's processes, and our supervisor, which would stop them gracefully."""
    supervisor = airflow._processes.pop("scheduler")
    parent = psutil.Process(supervisor.pid)
    for process in [*parent.children(recursive=True), parent]:
        process.kill()
    supervisor.wait()


def everything_written(airflow: StandaloneAirflow, cluster: FakeCluster) -> dict[str, str]:
    """Collect Airflow's database (with rendered templates, XComs and triggers), its logs, and every API request."""
    files = {str(p): p.read_bytes().decode(errors="replace") for p in airflow.home.rglob("*") if p.is_file()}
    return {**files, "sent": str([request.data for request in cluster.emulator if request.data])}


def test_a_run_survives_a_killed_scheduler_and_triggerer_and_an_evicted_pod_and_runs_nothing_twice(
    cluster: FakeCluster, airflow: StandaloneAirflow, zygote: Zygote, tmp_path: Path
) -> None:
    pools = yaml.safe_load((project_root() / "manifests" / "airflow" / "values.yaml").read_text())
    command = pools["migrateDatabaseJob"]["args"][-1].partition("&& exec ")[2].split('"')[0].split()
    completed = subprocess.run([sys.executable, "-m", *command, "GPUs"], env=airflow._environment, capture_output=True)
    assert completed.returncode == 0, completed.stderr

    triggerer_process = start_triggerer(airflow)
    try:
        with Kubelet(cluster, zygote) as kubelet:
            run = airflow.api.trigger("pods", {})
            wait_until(lambda: kubelet.held_pod_uid)
            wait_until(lambda: state(airflow, run, "train_qlora") == "deferred")
            pool = airflow.api.request("GET", "pools/gpu")
            assert pool["open_slots"] == pool["slots"] - 1, "a task that waits for its pod keeps its slot"

            # A trigger that has not begun deletes no pod; the next try would follow the first one's.
            first_log = airflow.log_file("pods", run, "train_qlora", 1)
            wait_until(lambda: any(first_log.parent.glob(f"{first_log.name}.trigger.*")))
            cleared, first_pod_uid = clear_task(airflow, run, "train_qlora"), kubelet.held_pod_uid
            assert cleared == ["train_qlora"]
            wait_until(
                lambda: kubelet.held_pod_uid != first_pod_uid and state(airflow, run, "train_qlora") == "deferred"
            )
            assert len(cluster.pods()) == 1, "the pod of the cleared task is gone"

            kill_scheduler(airflow)
            kill(triggerer_process)
            kubelet.evict.set()
            wait_until(lambda: "Evicted" in str(cluster.pods()))
            airflow._start_process("scheduler")
            triggerer_process = start_triggerer(airflow)
            wait_until(lambda: is_over(airflow, run))
        states = {t.task_id: t.state for t in airflow.api.task_states("pods", run)}
        assert set(states.values()) == {"success"}, states
    finally:
        kill(triggerer_process)

    steps = ["validate_data", "quantize_model", *["train_qlora"] * 3, "evaluate", "merge_adapter", "publish"]
    assert sorted(kubelet.steps_run) == sorted(steps), "the cleared and the evicted pod ran again, and no other"
    assert cluster.pods() == [], "pods that succeeded are deleted, and the evicted one was replaced"
    store = open_store((tmp_path / "store").as_uri())
    assert any(entry.path.endswith("manifest.json") for entry in store.list("models/pods/versions"))
    # After a clear, a try may find the old pod before the trigger deletes it; that costs one more try.
    log_files = airflow.log_file("pods", run, "train_qlora", 1).parent.glob("attempt=*.log")
    assert any(
        "try again (75): Evicted: The node was low on resource: memory." in log_file.read_text()
        for log_file in log_files
    )
    texts = everything_written(airflow, cluster)
    assert [place for place, text in texts.items() if "canary" in text] == []
    database = next(text for place, text in texts.items() if place.endswith("airflow.db"))
    assert all(word in database for word in ("rendered_task_instance_fields", "components.train_qlora", "xcom"))
    assert "components.train_qlora" in texts["sent"]


def clear_task(airflow: StandaloneAirflow, run: str, task: str) -> list[str]:
    """Clear a task as the button in the UI does; return the names of what was cleared."""
    body = {"dry_run": False, "dag_run_id": run, "task_ids": [task], "only_failed": False, "only_running": False}
    cleared = airflow.api.request("POST", "dags/pods/clearTaskInstances", body)
    return [task["task_id"] for task in cleared["task_instances"]]


def state(airflow: StandaloneAirflow, run: str, task: str) -> str | None:
    return next(t.state for t in airflow.api.task_states("pods", run) if t.task_id == task)


def is_over(airflow: StandaloneAirflow, run: str) -> bool:
    """Return whether the run has ended; False where the API server is too slow to answer."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        return airflow.api.dag_run("pods", run)["state"] in ("success", "failed")
    return False


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what must come; the time that it takes depends on the machine, so only a hang fails the test."""
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline, "waited 900 s"
        time.sleep(0.5)
