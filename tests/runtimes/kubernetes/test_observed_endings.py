"""How pods are read that a real Kubernetes 1.36 (containerd) showed: evicted, lost with their node, or gone."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client import ApiClient

from qlora_retrain.core.errors import Cause
from qlora_retrain.runtimes.kubernetes import pod_status
from tests.runtimes.kubernetes.tasks import written_ending

NOT_LOCATED = "The container could not be located when the pod was terminated"
LOG_IS_GONE = "unable to retrieve container logs for containerd://9f1c2e"
# What containerd reports of every container after its node has restarted.
AFTER_REBOOT = {"exitCode": 255, "reason": "Unknown", "startedAt": "2026-01-31T03:00:00Z"}
LOST_CONTAINER = {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": NOT_LOCATED}
PREEMPTION = {
    "type": "DisruptionTarget",
    "status": "True",
    "reason": "PreemptionByScheduler",
    "message": "default-scheduler: preempting to accommodate a higher priority pod",
}
KUEUE_PREEMPTION = {
    "type": "TerminationTarget",
    "status": "True",
    "reason": "WorkloadEvictedDueToPreempted",
    "message": "Preempted to accommodate a higher priority Workload",
}


def observed_pod(terminated: dict[str, Any] | None = None, **status: Any) -> Any:
    """Build a V1Pod as the API's client would; its container runs where it is not terminated."""
    state = {"terminated": terminated} if terminated else {"running": {"startedAt": "2026-01-31T03:00:00Z"}}
    image = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    document = {
        "metadata": {"name": "p", "uid": "u", "labels": {"qlora-retrain.step": "train_qlora"}},
        "spec": {"containers": [{"name": "base", "resources": {"limits": {"memory": "8Gi"}}}]},
        "status": {"phase": "Running", "containerStatuses": [{"name": "base", "state": state, **image}], **status},
    }
    return ApiClient().deserialize(SimpleNamespace(data=json.dumps(document)), "V1Pod")


def removal_event(reason: str, message: str) -> Any:
    return SimpleNamespace(reason=reason, message=message)


def summary_of(ending: pod_status.PodEnding | None) -> tuple[str, Cause | None]:
    assert ending is not None
    as_ending = ending.as_ending("train_qlora")
    return as_ending.summary(), as_ending.cause


@pytest.mark.parametrize(
    "terminated",
    [AFTER_REBOOT, {"exitCode": 255, "reason": "Error"}, {"exitCode": 0, "reason": "Unknown"}, LOST_CONTAINER],
)
def test_a_container_that_its_node_lost_is_tried_again(terminated: dict[str, Any]) -> None:
    summary, cause = summary_of(pod_status.read_ending(observed_pod(terminated, phase="Failed")))
    reason = terminated["reason"]
    assert summary == f"try again (75): {reason}: the node lost its container, as when it restarts"
    assert cause == Cause.NODE_LOST


def test_what_a_step_wrote_before_its_node_restarted_is_quoted() -> None:
    message = written_ending(75, Cause.PREEMPTED, "saved at step 399")
    pod = observed_pod({**AFTER_REBOOT, "message": message}, phase="Failed")
    assert summary_of(pod_status.read_ending(pod))[0].endswith("last output: saved at step 399")


@pytest.mark.parametrize(
    ("message", "expected", "cause"),
    [
        (
            'Usage of EmptyDir volume "work" exceeds the limit "1Gi". ',
            'config or usage error (12): Evicted: Usage of EmptyDir volume "work" exceeds the limit "1Gi". '
            "Set a larger runtime.disk_gib in platform.yaml, or disk_gib in the profile",
            Cause.DISK_FULL,
        ),
        (
            "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 900Mi. ",
            "try again (75): Evicted: The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, "
            "available: 900Mi.",
            Cause.PREEMPTED,
        ),
    ],
)
def test_an_evicted_pods_own_reason_comes_before_its_lost_container(message: str, expected: str, cause: Cause) -> None:
    pod = observed_pod(LOST_CONTAINER, phase="Failed", reason="Evicted", message=message)
    summary, actual_cause = summary_of(pod_status.read_ending(pod))
    assert summary == expected
    assert actual_cause == cause


@pytest.mark.parametrize("sentence", [NOT_LOCATED, LOG_IS_GONE])
def test_a_sentence_of_the_kubelet_is_never_quoted_as_the_steps_output(sentence: str) -> None:
    for terminated in (LOST_CONTAINER, AFTER_REBOOT, {"exitCode": 137, "reason": "Error"}):
        pod = observed_pod({**terminated, "message": sentence}, phase="Failed")
        assert sentence not in summary_of(pod_status.read_ending(pod))[0]


@pytest.mark.parametrize("condition", [PREEMPTION, KUEUE_PREEMPTION])
def test_a_pod_that_is_gone_ends_as_it_was_last_seen(condition: dict[str, Any]) -> None:
    running = pod_status.gone_ending(observed_pod(conditions=[condition]), [])
    described = f"{condition['type']}, {condition['reason']}: {condition['message']}"
    assert summary_of(running) == (f"try again (75): the pod is gone: {described}", Cause.PREEMPTED)

    ended = observed_pod({"exitCode": 143, "reason": "Error"}, phase="Failed", conditions=[condition])
    assert summary_of(pod_status.gone_ending(ended, [])) == (f"try again (75): {described}", Cause.PREEMPTED)


def test_a_pod_that_nobody_saw_ends_as_its_most_telling_event_says() -> None:
    events = [
        removal_event("Pulled", "Container image is present"),
        removal_event("Killing", "Stopping container base"),
        removal_event("Preempted", "Preempted by pod 7c9d on node gpu-1"),
    ]
    for last_pod in (None, observed_pod()):
        summary, _ = summary_of(pod_status.gone_ending(last_pod, events))
        assert summary == "try again (75): the pod is gone: Preempted: Preempted by pod 7c9d on node gpu-1"
        summary, _ = summary_of(pod_status.gone_ending(last_pod, events[:1]))
        assert summary == "try again (75): the pod is gone: its node was lost, or somebody deleted it"


def test_a_container_that_one_nodes_runtime_cannot_create_may_start_on_another_node() -> None:
    message = "OCI runtime create failed: nvidia-container-cli: initialization error"
    waiting = {"waiting": {"reason": "CreateContainerError", "message": message}}
    pod = observed_pod()
    pod.status.container_statuses[0].state = ApiClient().deserialize(
        SimpleNamespace(data=json.dumps(waiting)), "V1ContainerState"
    )
    pod.spec.containers[0].image = "i"
    summary, _ = summary_of(pod_status.startup_failure(pod))
    assert summary == f"try again (75): the pod did not start: CreateContainerError (i): {message}"
