"""The Kubernetes operator against the API over HTTP: a pod that is not taken, or does not begin, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import begin, context, ends, go_on, trigger_of

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]


def test_an_image_that_cannot_be_pulled_is_named_and_its_pod_removed(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.waits("ImagePullBackOff", "Back-off pulling image: not found")
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert "ImagePullBackOff (qlora-retrain-light:0.1.0)" in said
    assert again
    assert cluster.pods() == []


@pytest.mark.parametrize("reason", ["InvalidImageName", "CreateContainerConfigError", "CreateContainerError"])
def test_a_container_that_can_never_be_made_fails_now(
    cluster: Cluster, made: Plan, step: Callable[..., Any], reason: str
) -> None:
    left = begin(step(), context(made))
    cluster.waits(reason, "it is wrong")
    event = {"status": "timeout", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "too long"}
    said, again = ends(lambda: step().resume_execution(left.method_name, {"event": event}, context(made)))
    assert said == f"config or usage (12): the pod did not start: {reason} (qlora-retrain-light:0.1.0): it is wrong"
    assert not again
    assert cluster.pods() == []


def too_late(left: Any, task: Any, run: dict[str, Any]) -> tuple[str, bool]:
    """How the task ends when half an hour is over and its container did not begin."""
    trigger = trigger_of(left)
    trigger.schedule_timeout = trigger.startup_timeout = 0
    event = asyncio.run(anext(trigger.run())).payload
    assert event["status"] == "timeout"
    return ends(lambda: task.resume_execution(left.method_name, {"event": event}, run))


def test_a_pod_that_no_node_takes_is_removed_with_the_schedulers_words(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    cluster.set(left.trigger.pod_name, conditions=[condition])
    assert too_late(left, step(), context(made)) == (f"try again (75): no node takes the pod: {words}", True)
    assert cluster.pods() == []


@pytest.mark.parametrize("kind", ["secret", "configmap"])
def test_a_secret_that_is_missing_fails_when_the_time_to_start_is_over_and_is_named(
    cluster: Cluster, made: Plan, step: Callable[..., Any], kind: str
) -> None:
    left = begin(step(), context(made))
    cluster.set(left.trigger.pod_name, conditions=[{"type": "PodScheduled", "status": "True"}])
    cluster.waits("ContainerCreating", "")
    missing = f'MountVolume.SetUp failed for volume "secret-0" : {kind} "qlora-retrain-store" not found'
    cluster.warns("FailedMount", missing, minutes=2)
    cluster.warns("FailedMount", "Unable to attach or mount volumes: timed out waiting for the condition")
    said, again = too_late(left, step(), context(made))
    assert said == f"config or usage (12): the pod did not start: FailedMount: {missing}"
    assert (again, cluster.pods()) == (False, [])


def test_a_pod_that_takes_too_long_to_start_is_removed_with_the_clusters_last_warning_of_it(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.set(left.trigger.pod_name, conditions=[{"type": "PodScheduled", "status": "True"}])
    cluster.waits("ContainerCreating", "")
    cluster.warns("FailedAttachVolume", "the disk is on another node", minutes=2)
    cluster.warns("FailedScheduling", "no room", minutes=20)
    cluster.warns("FailedMount", 'secret "x" not found', uid="of an earlier pod of this name")
    said, again = too_late(left, step(), context(made))
    assert said.startswith("try again (75): Pod took too long to start.")
    assert said.endswith("; FailedAttachVolume: the disk is on another node")
    assert (again, cluster.pods()) == (True, [])


@pytest.mark.parametrize(
    ("status", "message", "said", "again"),
    [
        (403, 'pods "x" is forbidden: exceeded quota: qlora-retrain', "quota is used up", True),
        (403, 'pods is forbidden: User "airflow" cannot create resource', "may not manage pods", False),
        (403, 'pods "x" is forbidden: violates PodSecurity "restricted:latest"', "refuses the pod (403)", False),
        (422, "Pod is invalid: spec.containers[0].resources", "refuses the pod (422)", False),
        (500, "etcdserver: request timed out", "Kubernetes API failed (500)", True),
    ],
)
def test_a_pod_that_the_api_does_not_take_is_explained(
    cluster: Cluster, made: Plan, step: Callable[..., Any], status: int, message: str, said: str, again: bool
) -> None:
    cluster.emulator.refuses["POST"] = (status, message)
    told, may_retry = ends(lambda: step().execute(context(made)))
    assert said in told
    assert may_retry is again
    assert cluster.pods() == []
    cluster.emulator.refuses.clear()
    begin(step(), context(made, tries=2))
    assert len(cluster.pods()) == 1, "the next try, or whoever clears the task, finds nothing in the way"
