"""The Kubernetes operator against the API over HTTP: one pod for a step, created, followed, awaited and deleted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.core.errors import Cause
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes import canaries
from tests.runtimes.kubernetes.tasks import (
    failure_of,
    first_event,
    rebuild_trigger,
    resume,
    run_until_deferred,
    task_context,
    written_ending,
)

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "container_reason", ["Completed", "OOMKilled"], ids=["undisturbed", "after one of its processes was killed"]
)
def test_a_pod_does_the_work_once_and_is_deleted_and_a_made_artifact_needs_no_pod(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], container_reason: str
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    assert cluster.run_step(container_reason=container_reason) == 0
    resume(deferred, make_task(), task_context(plan))
    assert cluster.pods() == []

    make_task().execute(task_context(plan, try_number=2))  # the artifact is complete: nothing to do
    assert cluster.pods() == []
    assert cluster.created_count() == 1
    from qlora_retrain.pipeline import status

    assert status.exit_code(plan, "validate_data") == 0


def test_a_worker_that_dies_leaves_a_pod_that_the_next_try_follows(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    # The worker, scheduler or triggerer that knew the deferred task is gone, so nothing of it is used below.
    run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    deferred = run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert cluster.created_count() == 1
    cluster.end_container(12, termination_message="validate_data: config or usage error (12): the same one ended")
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan, try_number=2)))
    assert (is_retried, "the same one ended" in message) == (False, True)
    assert cluster.created_count() == 1


def test_an_answer_that_is_lost_after_the_pod_was_made_makes_no_second_one(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until_deferred(make_task(), task_context(plan))
    task = make_task()
    monkeypatch.setattr(task, "_find_pod_to_follow", lambda: None)  # it looked before the first one existed
    deferred = run_until_deferred(task, task_context(plan))
    assert deferred.trigger.pod_name == cluster.pod()["metadata"]["name"]
    assert len(cluster.pods()) == 1


def test_a_pod_that_ended_while_nobody_looked_is_judged_and_not_run_again(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    run_until_deferred(make_task(), task_context(plan))
    cluster.end_container(14, termination_message=written_ending(14, Cause.DIVERGED, "the loss is nan"))
    message, is_retried = failure_of(lambda: make_task().execute(task_context(plan, try_number=2)))
    assert (message, is_retried) == ("training diverged (14): the loss is nan", False)
    assert cluster.created_count() == 1

    # The pod was checked, so a person who clears the task wants another try.
    run_until_deferred(make_task(), task_context(plan, try_number=3))
    assert cluster.created_count() == 2
    assert len(cluster.pods()) == 1


def test_killing_a_task_in_the_worker_deletes_its_pod(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    task = make_task()
    run_until_deferred(task, task_context(plan))
    task.on_kill()
    assert cluster.pods() == []


def test_killing_a_deferred_task_deletes_its_pod_and_a_triggerer_that_stops_does_not(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    asyncio.run(rebuild_trigger(deferred).cleanup())  # what a triggerer does that shuts down
    assert len(cluster.pods()) == 1
    asyncio.run(rebuild_trigger(deferred).on_kill())  # what it does when a person fails or clears the task
    assert cluster.pods() == []


def test_a_triggerer_in_the_cluster_finds_it_by_its_service_account(
    cluster_from_inside: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    cluster = cluster_from_inside
    deferred = run_until_deferred(make_task(), task_context(plan))
    assert "canary" not in str(deferred.trigger.serialize())

    async def event_status() -> str:
        event = asyncio.create_task(anext(rebuild_trigger(deferred).run()))
        # Wait for the trigger's last connection: asyncio leaks one that is cancelled during its TLS handshake.
        while ("watch", "events") not in cluster.emulator.used_verbs and not event.done():
            await asyncio.sleep(0.1)
        cluster.end_container(12)
        return str((await event).payload["status"])

    assert asyncio.run(event_status()) == "failed", "the trigger saw it end"
    asyncio.run(rebuild_trigger(deferred).on_kill())
    assert cluster.pods() == []

    tokens = {request.headers.get("Authorization", "").partition(" ")[2] for request in cluster.emulator}
    assert tokens == {"", canaries.SERVICE_ACCOUNT}, "only the test itself sends none"


def test_a_pod_that_still_saves_is_waited_for_and_there_are_never_two(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    cluster.emulator.waits_for_kubelet = True
    task = make_task()
    run_until_deferred(task, task_context(plan))
    cluster.start_container()
    task.on_kill()
    assert cluster.pod()["metadata"]["deletionTimestamp"]

    pod_counts = []
    kubelet = threading.Timer(2, cluster.finish_deletions)
    started = time.monotonic()
    kubelet.start()
    run_until_deferred(make_task(), task_context(plan, try_number=2))
    pod_counts.append(len(cluster.pods()))
    kubelet.join()
    assert time.monotonic() - started > 1.5
    assert pod_counts == [1]


def test_a_pod_that_began_when_it_was_just_given_up_is_followed(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import TaskDeferred

    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    event = {
        "status": "timeout",
        "name": deferred.trigger.pod_name,
        "namespace": "qlora-retrain",
        "message": "too long",
    }
    with pytest.raises(TaskDeferred) as deferred_again:
        make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
    assert (cluster.created_count(), len(cluster.pods())) == (1, 1)

    cluster.end_container(75)
    assert first_event(deferred_again.value)["status"] == "failed"


def test_a_deleted_pod_is_created_again_at_once_but_not_without_end(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import TaskDeferred

    deferred = run_until_deferred(make_task(), task_context(plan))
    event = {"status": "error", "name": deferred.trigger.pod_name, "namespace": "qlora-retrain", "message": "404"}
    for created_count in (2, 3, 4):
        cluster.api.delete_namespaced_pod(deferred.trigger.pod_name, "qlora-retrain")
        with pytest.raises(TaskDeferred) as deferred_again:
            make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
        event = {**event, **deferred_again.value.trigger.trigger_kwargs}
        assert (cluster.created_count(), len(cluster.pods())) == (created_count, 1)

    cluster.api.delete_namespaced_pod(deferred.trigger.pod_name, "qlora-retrain")
    message, is_retried = failure_of(
        lambda: make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
    )
    assert "the pod is gone: its node was lost" in message
    assert is_retried
    run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert len(cluster.pods()) == 1


def test_a_pod_that_the_triggerer_lost_sight_of_is_followed_on(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import AirflowException, TaskDeferred

    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    event = {"status": "error", "name": deferred.trigger.pod_name, "namespace": "qlora-retrain", "message": "503"}
    for _ in range(3):
        with pytest.raises(TaskDeferred) as deferred_again:
            make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
        event = {**event, **deferred_again.value.trigger.trigger_kwargs}
    with pytest.raises(AirflowException, match="cannot follow the pod"):
        make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
    assert cluster.created_count() == 1


def test_a_pod_whose_end_the_cluster_never_reports_is_deleted_after_its_deadline(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    task = make_task("train_qlora")
    deferred = run_until_deferred(task, task_context(plan))
    assert cluster.pod()["spec"]["activeDeadlineSeconds"] == (168 + 2) * 3600
    assert deferred.timeout.total_seconds() > (168 + 2) * 3600
    cluster.start_container()

    # What Airflow resumes a task with whose trigger took too long.
    error = {"error": "Trigger timeout"}
    message, may_retry = failure_of(
        lambda: make_task("train_qlora").resume_execution("__fail__", error, task_context(plan))
    )
    assert "(12): stopped at its deadline, after 170 hours: train.max_hours and 2 hours" in message
    assert not may_retry
    assert cluster.pods() == []
