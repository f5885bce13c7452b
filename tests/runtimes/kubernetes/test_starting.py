"""The Kubernetes operator against the API over HTTP: a pod that is rejected or does not start, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import failure_of, rebuild_trigger, resume, run_until_deferred, task_context

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]


def test_an_image_that_cannot_be_pulled_is_named_and_its_pod_removed(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.set_waiting("ImagePullBackOff", "Back-off pulling image: not found")
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert "ImagePullBackOff (qlora-retrain-light:0.1.0)" in message
    assert is_retried
    assert cluster.pods() == []


@pytest.mark.parametrize("reason", ["InvalidImageName", "CreateContainerConfigError"])
def test_a_container_that_can_never_be_made_fails_now(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], reason: str
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.set_waiting(reason, "it is wrong")
    event = {
        "status": "timeout",
        "name": deferred.trigger.pod_name,
        "namespace": "qlora-retrain",
        "message": "too long",
    }
    message, is_retried = failure_of(
        lambda: make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
    )
    assert (
        message
        == f"config or usage error (12): the pod did not start: {reason} (qlora-retrain-light:0.1.0): it is wrong"
    )
    assert not is_retried
    assert cluster.pods() == []


def fail_by_startup_timeout(deferred: Any, task: Any, context: dict[str, Any]) -> tuple[str, bool]:
    """Let the startup timeout pass; return the task's message, and whether Airflow would retry it."""
    trigger = rebuild_trigger(deferred)
    trigger.schedule_timeout = trigger.startup_timeout = 0  # seconds, instead of half an hour
    event = asyncio.run(anext(trigger.run())).payload
    assert event["status"] == "timeout"
    return failure_of(lambda: task.resume_execution(deferred.method_name, {"event": event}, context))


def test_a_pod_that_no_node_takes_is_removed_with_the_schedulers_words(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    cluster.set_status(deferred.trigger.pod_name, conditions=[condition])
    assert fail_by_startup_timeout(deferred, make_task(), task_context(plan)) == (
        f"try again (75): no node takes the pod: {words}",
        True,
    )
    assert cluster.pods() == []


@pytest.mark.parametrize("hours", [60, 80], ids=["its turn may come", "too long"])
def test_a_pod_in_a_queue_waits_for_its_turn_and_costs_no_try_until_it_is_too_long(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], hours: float
) -> None:
    task = make_task(local_queue="team-a")
    deferred = run_until_deferred(task, task_context(plan))
    assert cluster.pod()["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert deferred.timeout.total_seconds() > (72 + 24) * 3600, "max_queue_hours and max_step_hours"
    cluster.gate(deferred.trigger.pod_name, hours)

    if hours > 72:
        assert fail_by_startup_timeout(deferred, make_task(local_queue="team-a"), task_context(plan)) == (
            "config or usage error (12): the pod waited behind its scheduling gates (kueue.x-k8s.io/admission) for "
            "longer than runtime.max_queue_hours; raise that in platform.yaml, or ask who runs the queue",
            False,
        )
        assert cluster.pods() == []
        return

    async def event_status() -> str:
        trigger = rebuild_trigger(deferred)
        trigger.schedule_timeout = trigger.startup_timeout = 1  # second
        event = asyncio.create_task(anext(trigger.run()))
        await asyncio.sleep(2)
        assert not event.done(), "it waits on"
        cluster.admit(deferred.trigger.pod_name)
        cluster.end_container(75)
        return str((await asyncio.wait_for(event, 90)).payload["status"])

    assert asyncio.run(event_status()) == "failed"
    assert cluster.created_count() == 1


@pytest.mark.parametrize("kind", ["secret", "configmap"])
def test_a_secret_that_is_missing_fails_when_the_time_to_start_is_over_and_is_named(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], kind: str
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.set_status(deferred.trigger.pod_name, conditions=[{"type": "PodScheduled", "status": "True"}])
    cluster.set_waiting("ContainerCreating", "")
    missing = f'MountVolume.SetUp failed for volume "secret-0" : {kind} "qlora-retrain-store" not found'
    cluster.add_event("FailedMount", missing, minutes=2)
    cluster.add_event("FailedMount", "Unable to attach or mount volumes: timed out waiting for the condition")
    message, is_retried = fail_by_startup_timeout(deferred, make_task(), task_context(plan))
    assert message == f"config or usage error (12): the pod did not start: FailedMount: {missing}"
    assert (is_retried, cluster.pods()) == (False, [])


def test_a_pod_that_takes_too_long_to_start_is_removed_with_the_clusters_last_warning_of_it(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.set_status(deferred.trigger.pod_name, conditions=[{"type": "PodScheduled", "status": "True"}])
    cluster.set_waiting("ContainerCreating", "")
    # Of three warnings one is older than another, and one is about an earlier pod.
    cluster.add_event("FailedAttachVolume", "the disk is on another node", minutes=2)
    cluster.add_event("FailedScheduling", "no room", minutes=20)
    cluster.add_event("FailedMount", 'secret "x" not found', uid="of an earlier pod of this name")
    message, is_retried = fail_by_startup_timeout(deferred, make_task(), task_context(plan))
    assert message.startswith("try again (75): Pod took too long to start.")
    assert message.endswith("; FailedAttachVolume: the disk is on another node")
    assert (is_retried, cluster.pods()) == (True, [])


@pytest.mark.parametrize(
    ("status", "api_message", "expected_message", "is_retried"),
    [
        (403, 'pods "x" is forbidden: exceeded quota: qlora-retrain', "quota is used up", True),
        (403, 'pods is forbidden: User "airflow" cannot create resource', "may not manage pods", False),
        (403, 'pods "x" is forbidden: violates PodSecurity "restricted:latest"', "refuses the pod (403)", False),
        (422, "Pod is invalid: spec.containers[0].resources", "refuses the pod (422)", False),
        (500, "etcdserver: request timed out", "Kubernetes API failed (500)", True),
    ],
)
def test_a_pod_that_the_api_does_not_take_is_explained(
    cluster: FakeCluster,
    plan: Plan,
    make_task: Callable[..., Any],
    status: int,
    api_message: str,
    expected_message: str,
    is_retried: bool,
) -> None:
    cluster.emulator.rejections["POST"] = (status, api_message)
    message, may_retry = failure_of(lambda: make_task().execute(task_context(plan)))
    assert expected_message in message
    assert may_retry is is_retried
    assert cluster.pods() == []

    cluster.emulator.rejections.clear()
    run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert len(cluster.pods()) == 1, "nothing prevents the next try, or that of a cleared task"
