"""A move on Kubernetes against the API over HTTP: the pod of `publish` with another command, followed to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.cluster_profile import load as load_profile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.runtimes.kubernetes import pod_spec

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]
RUN = "20260131T030000Z-0123456789ab"
TIMEOUT = timedelta(minutes=10)


@pytest.fixture
def make_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from qlora_retrain.runtimes.airflow import publish_pod

    monkeypatch.setattr(publish_pod, "_POLL_SECONDS", 0.1)

    def make(runtime: RuntimeConfig | None = None, **changes: object) -> Any:
        profile = load_profile(project_root() / "manifests" / "profiles" / "gpu.yaml")
        accounts = {"service_account": "qlora-retrain", "account_per_step": True}
        document = {**profile.model_dump(exclude_unset=True), **accounts, **changes}
        return publish_pod.KubernetesCommand(
            task_id="publish",
            step="publish",
            line="tickets",
            runtime=runtime or RuntimeConfig(),
            profile=ClusterProfile.model_validate(document),
        )

    return make


def follow(cluster: FakeCluster, command: Any, arguments: list[str], act: Callable[[], object]) -> Ending:
    """Run a command, and act on the cluster once its pod is there."""
    endings: list[Ending] = []
    thread = threading.Thread(target=lambda: endings.append(command.run_command(arguments, RUN, TIMEOUT)))
    thread.start()
    while not cluster.pods():
        assert thread.is_alive()
    act()
    thread.join(60)
    (ending,) = endings
    return ending


def test_the_pod_is_that_of_publish_but_for_its_command_and_its_name(
    cluster: FakeCluster, make_command: Callable[..., Any]
) -> None:
    command = make_command()
    step = graph.step("publish")
    expected = pod_spec.operator_arguments(step, "tickets", command.profile, command.runtime)
    command.prepare_command(["promote", "tickets", "--reason=costs $5, $(AWS_DEFAULT_REGION)"], RUN, TIMEOUT)
    pod = command.pod_request_obj
    assert pod.spec.service_account_name == expected["service_account_name"] == "qlora-retrain-publish-tickets"
    container = pod.spec.containers[0]
    assert container.image == expected["image"]
    assert container.resources == expected["container_resources"]
    assert {m.mount_path for m in container.volume_mounts} == {m.mount_path for m in expected["volume_mounts"]}
    assert pod.metadata.labels.items() >= expected["labels"].items()
    # Kubernetes makes `$` of `$$`, and would put variables into `$(NAME)`.
    assert container.args == [
        "python", "-m", "qlora_retrain.cli", "promote", "tickets", "--reason=costs $$5, $$(AWS_DEFAULT_REGION)",
    ]  # fmt: skip
    assert len(pod.metadata.name) <= 63
    assert pod.metadata.name.endswith(RUN.lower())
    assert pod.spec.active_deadline_seconds == 600


def test_with_auto_it_gets_what_the_profile_allows(cluster: FakeCluster, make_command: Callable[..., Any]) -> None:
    command = make_command(light={"memory_gib": "auto", "max_memory_gib": 7})
    command.prepare_command(["rollback"], RUN, TIMEOUT)
    assert command.pod_request_obj.spec.containers[0].resources.limits["memory"] == "7Gi"


def test_a_command_that_is_refused_ends_with_its_own_words_and_its_pod_is_removed(
    cluster: FakeCluster, make_command: Callable[..., Any], tmp_path: Any
) -> None:
    arguments = ["promote", "tickets", "20260101T000000Z-0123456789ab", f"--root={tmp_path.as_uri()}", "--reason=x"]
    ending = follow(cluster, make_command(), arguments, cluster.run_step)
    assert ending.code == 12
    assert "line tickets has no version 20260101T000000Z-0123456789ab" in ending.reason
    cluster.finish_deletions()
    assert cluster.pods() == []


def test_a_pod_that_cannot_start_is_tried_again_and_one_of_an_earlier_try_is_followed(
    cluster: FakeCluster, make_command: Callable[..., Any]
) -> None:
    waiting = follow(
        cluster, make_command(), ["history", "x"], lambda: cluster.set_waiting("ImagePullBackOff", "not found")
    )
    assert (waiting.code, waiting.cause) == (75, Cause.NOT_STARTED)
    cluster.finish_deletions()

    first = make_command()
    first.prepare_command(["history"], RUN, TIMEOUT)
    first._create_or_follow()
    cluster.end_container(0)
    assert make_command().run_command(["history"], RUN, TIMEOUT).code == 0
    assert cluster.created_count() == 2
