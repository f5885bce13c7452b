"""The whole pipeline as pods, by a real Airflow: scheduler, triggerer, and Kubernetes' API over HTTP.

The test is the kubelet: it runs every pod's command line. In the middle somebody clears a task that waits for its
pod, then scheduler and triggerer are killed, and the pod is evicted while neither runs.
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
    from qlora_retrain.demo.standalone_airflow import EmbeddedAirflow
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
LINE = {
    "line": "pods",
    "data": {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 10, "batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"first_release": True, "min_gain_over_base": 0.1, "bootstrap_samples": 500, "max_loss_to_champion": 1},
    "merge": {"max_loss_nats": 0.5, "min_rows": 10},
    "runtime": {"kind": "kubernetes"},
}


class Kubelet:
    """Runs the command line of every pod, one after the other; those that train are kept from it until it evicts."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.ran: list[str] = []
        self.held = ""  # the uid of a pod that is kept
        self.evict = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Kubelet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.evict.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.3):
            for pod in self.cluster.pods():
                if "containerStatuses" not in pod["status"]:
                    self._run(pod)

    def _run(self, pod: dict[str, Any]) -> None:
        name, step = pod["metadata"]["name"], pod["metadata"]["labels"]["qlora-retrain.step"]
        self.ran.append(step)
        self._is(name, {"running": {"startedAt": "2026-01-31T03:00:00Z"}}, phase="Running")
        if step == "train_qlora" and not self.evict.is_set():
            self.held = pod["metadata"]["uid"]
            while not self.evict.wait(0.3):
                if self.held not in [other["metadata"]["uid"] for other in self.cluster.pods()]:
                    return  # somebody deleted it
            gone = {"terminated": {"exitCode": 137, "reason": "Error"}}
            self._is(name, gone, phase="Failed", reason="Evicted", message="The node was low on resource: memory.")
            return
        container = pod["spec"]["containers"][0]
        variables = {
            v["name"]: v["value"] for v in container["env"] if not v["value"].startswith(("/workspace", "/tmp"))
        }
        done = subprocess.run(
            [sys.executable, *container["args"][1:]],
            env={**os.environ, **variables},
            cwd=project_root(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.cluster.emulator.logs[name] = done.stdout
        ended = {"exitCode": done.returncode, "reason": "Error" if done.returncode else "Completed"}
        self._is(name, {"terminated": ended}, phase="Failed" if done.returncode else "Succeeded")

    def _is(self, name: str, state: dict[str, Any], **status: Any) -> None:
        image = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}
        scheduled = [{"type": "PodScheduled", "status": "True"}]
        statuses = [{"name": "base", "state": state, **image}]
        self.cluster.set(name, containerStatuses=statuses, conditions=scheduled, **status)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    from tests.runtimes.kubernetes.cluster import running

    yield from running(tmp_path)


@pytest.fixture
def airflow(
    cluster: Cluster, tmp_path: Path, tiny_model: Path, write_tickets: Callable[[Path, int], Path]
) -> Iterator[EmbeddedAirflow]:
    from qlora_retrain.demo.standalone_airflow import EmbeddedAirflow

    tickets = write_tickets(tmp_path / "tickets.jsonl", 300)
    document = {**LINE, "sources": {"raw_data": str(tickets), "base_model": str(tiny_model)}}
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "pods.yaml").write_text(yaml.safe_dump(document))
    environment = {
        "QLORA_RETRAIN_ROOT": (tmp_path / "store").as_uri(),
        "QLORA_RETRAIN_PIPELINES": str(tmp_path / "pipelines"),
        "QLORA_RETRAIN_PROFILE": str(project_root() / "manifests" / "profiles" / "gpu.yaml"),
        "KUBECONFIG": str(cluster.kubeconfig),
        **canaries.environment(tmp_path),
        # A triggerer that was killed is found out in seconds, not in half a minute.
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "5",
        "OMP_NUM_THREADS": "1",
    }
    with EmbeddedAirflow(tmp_path / "home", environment=environment) as made:
        made.wait_for_dag("pods")
        made.api.unpause("pods")
        yield made


def triggerer(airflow: EmbeddedAirflow) -> subprocess.Popen[bytes]:
    """Start one; the embedded Airflow needs none, since nothing else of ours waits."""
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


def kill_scheduler(airflow: EmbeddedAirflow) -> None:
    """SIGKILL it, its executor's processes, and what of ours would have ended them in order."""
    leash = airflow._parts.pop("scheduler")
    parent = psutil.Process(leash.pid)
    for process in [*parent.children(recursive=True), parent]:
        process.kill()
    leash.wait()


def everything_written(airflow: EmbeddedAirflow, cluster: Cluster) -> dict[str, str]:
    """Airflow's database, with rendered templates, XComs and triggers in it; its logs; all that the API was sent."""
    files = {str(p): p.read_bytes().decode(errors="replace") for p in airflow.home.rglob("*") if p.is_file()}
    return {**files, "sent": str([request.data for request in cluster.emulator if request.data])}


def test_a_run_survives_a_killed_scheduler_and_triggerer_and_an_evicted_pod_and_runs_nothing_twice(
    cluster: Cluster, airflow: EmbeddedAirflow, tmp_path: Path
) -> None:
    pools = yaml.safe_load((project_root() / "manifests" / "airflow" / "values.yaml").read_text())
    command = pools["migrateDatabaseJob"]["args"][-1].partition("&& exec ")[2].split('"')[0].split()
    made = subprocess.run([sys.executable, "-m", *command, "GPUs"], env=airflow._environment, capture_output=True)
    assert made.returncode == 0, made.stderr
    waiting = triggerer(airflow)
    try:
        with Kubelet(cluster) as kubelet:
            run = airflow.api.trigger("pods", {})
            until(lambda: kubelet.held, 400)
            until(lambda: state(airflow, run, "train_qlora") == "deferred", 60)
            pool = airflow.api.call("GET", "pools/gpu")
            assert pool["open_slots"] == pool["slots"] - 1, "a task that waits for its pod holds its place"
            cleared, kept = clear(airflow, run, "train_qlora"), kubelet.held
            assert cleared == ["train_qlora"]
            until(lambda: kubelet.held != kept and state(airflow, run, "train_qlora") == "deferred", 120)
            assert len(cluster.pods()) == 1, "the pod of the cleared task is gone"
            kill_scheduler(airflow)
            kill(waiting)
            kubelet.evict.set()
            until(lambda: "Evicted" in str(cluster.pods()), 60)
            airflow._start("scheduler")
            waiting = triggerer(airflow)
            until(lambda: is_over(airflow, run), 500)
        told = {t.name: t.state for t in airflow.api.tasks("pods", run)}
        assert set(told.values()) == {"success"}, told
    finally:
        kill(waiting)
    steps = ["validate_data", "quantize_model", *["train_qlora"] * 3, "evaluate", "merge_adapter", "publish"]
    assert sorted(kubelet.ran) == sorted(steps), "the cleared and the evicted one again, and no other"
    assert cluster.pods() == [], "those that did their work are gone, and the evicted one was replaced"
    store = open_store((tmp_path / "store").as_uri())
    assert any(entry.path.endswith("manifest.json") for entry in store.list("models/pods/versions"))
    # A try that follows a clear and comes before the trigger is told finds the old pod and then loses it: a try more.
    tries = airflow.log_file("pods", run, "train_qlora", 1).parent.glob("attempt=*.log")
    assert any("try again (75): Evicted: The node was low on resource: memory." in one.read_text() for one in tries)
    written = everything_written(airflow, cluster)
    assert [place for place, text in written.items() if "canary" in text] == []
    database = next(text for place, text in written.items() if place.endswith("airflow.db"))
    assert all(word in database for word in ("rendered_task_instance_fields", "components.train_qlora", "xcom"))
    assert "components.train_qlora" in written["sent"]


def clear(airflow: EmbeddedAirflow, run: str, task: str) -> list[str]:
    """As the button in the UI does; the names of what was cleared."""
    body = {"dry_run": False, "dag_run_id": run, "task_ids": [task], "only_failed": False, "only_running": False}
    cleared = airflow.api.call("POST", "dags/pods/clearTaskInstances", body)
    return [task["task_id"] for task in cleared["task_instances"]]


def state(airflow: EmbeddedAirflow, run: str, task: str) -> str | None:
    return next(t.state for t in airflow.api.tasks("pods", run) if t.name == task)


def is_over(airflow: EmbeddedAirflow, run: str) -> bool:
    """Whether the run has ended; an API server that is slow is asked again."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        return airflow.api.run("pods", run)["state"] in ("success", "failed")
    return False


def until(true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.5)
