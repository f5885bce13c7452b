"""The Kubernetes operator against the API over HTTP: what a real Kubernetes 1.36 did to it, replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import (
    failure_of,
    rebuild_trigger,
    resume,
    run_until_deferred,
    task_context,
    wait_for_looks,
)

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]
NAMESPACE = "qlora-retrain"
LOG_IS_GONE = "unable to retrieve container logs for containerd://9f1c2e"
PREEMPTION = {
    "type": "DisruptionTarget",
    "status": "True",
    "reason": "PreemptionByScheduler",
    "message": "default-scheduler: preempting to accommodate a higher priority pod",
}
NOT_PERMITTED = (
    'pods is forbidden: User "system:serviceaccount:airflow:airflow-scheduler" cannot create resource "pods" in API '
    'group "" in the namespace "qlora-retrain"'
)


def event_while(
    cluster: FakeCluster, deferred: Any, act: Callable[[], None], *, is_ended: Callable[[], None]
) -> dict[str, Any]:
    """Run the trigger; act and, after it has looked at the pod again, let the pod end; return the trigger's event."""

    async def run() -> dict[str, Any]:
        trigger = rebuild_trigger(deferred)
        trigger.logging_interval = 0.1  # seconds
        event = asyncio.create_task(anext(trigger.run()))
        await wait_for_looks(cluster)
        act()
        await asyncio.sleep(1)
        await wait_for_looks(cluster)
        is_ended()
        payload: dict[str, Any] = (await asyncio.wait_for(event, 90)).payload
        return payload

    return asyncio.run(run())


def continue_task(task: Any, deferred: Any, event: dict[str, Any], context: dict[str, Any]) -> Any:
    """Resume the task with an event; return the TaskDeferred by which it follows a pod again."""
    from airflow.sdk.exceptions import TaskDeferred

    with pytest.raises(TaskDeferred) as deferred_again:
        task.resume_execution(deferred.method_name, {"event": event}, context)
    return deferred_again.value


def event_of(deferred: Any, **fields: Any) -> dict[str, Any]:
    """Build what a trigger reports that saw nothing."""
    fixed = {"name": deferred.trigger.pod_name, "namespace": NAMESPACE, "message": "404"}
    return {"status": "error", **fixed, **deferred.trigger.trigger_kwargs, **fields}


def test_a_preempted_pod_that_is_gone_at_once_leaves_its_reason_and_its_last_lines(
    cluster: FakeCluster,
    plan: Plan,
    make_task: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    name = deferred.trigger.pod_name
    cluster.start_container()

    def preempt() -> None:
        cluster.emulator.logs[name] = "2026-01-31T03:01:02.5Z saved at step 412\n"
        cluster.set_status(name, conditions=[PREEMPTION])

    event = event_while(cluster, deferred, preempt, is_ended=lambda: cluster.api.delete_namespaced_pod(name, NAMESPACE))
    assert [record for record in caplog.records if record.exc_info] == []
    (container,) = event["observation"]["pod"]["spec"]["containers"]
    assert set(container) == {"name", "image", "resources"}, "no variables: the event is in Airflow's database"
    capsys.readouterr()
    continue_task(make_task(), deferred, event, task_context(plan))
    printed = capsys.readouterr().out
    assert "is created again: the pod is gone: DisruptionTarget, PreemptionByScheduler: default-scheduler" in printed
    assert "saved at step 412" in printed
    assert cluster.created_count() == 2

    # A try that has created three pods again fails, and says the same.
    cluster.api.delete_namespaced_pod(name, NAMESPACE)
    message, is_retried = failure_of(
        lambda: make_task().resume_execution(
            deferred.method_name, {"event": {**event, "_redefer_count": 3}}, task_context(plan)
        )
    )
    assert message.startswith("try again (75): the pod is gone: DisruptionTarget, PreemptionByScheduler: ")
    assert message.endswith("last output: saved at step 412")
    assert is_retried


def test_a_pod_that_went_before_the_trigger_saw_it_is_explained_by_its_events(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.add_event("Killing", "Stopping container base", event_type="Normal")
    cluster.add_event("TaintManagerEviction", "Marking for deletion Pod qlora-retrain/x", event_type="Normal")
    cluster.add_event("Preempted", "Preempted by pod 7c9d on node gpu-1", uid="of an earlier pod of this name")
    cluster.api.delete_namespaced_pod(deferred.trigger.pod_name, NAMESPACE)
    event = event_of(deferred, _redefer_count=3)
    message, is_retried = failure_of(
        lambda: make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan))
    )
    expected = "try again (75): the pod is gone: TaintManagerEviction: Marking for deletion Pod qlora-retrain/x"
    assert (message, is_retried) == (expected, True)


def test_a_pod_that_was_killed_for_memory_and_is_gone_gets_more_memory(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    event = event_while(
        cluster, deferred, lambda: None, is_ended=lambda: cluster.end_container(137, container_reason="OOMKilled")
    )
    cluster.api.delete_namespaced_pod(deferred.trigger.pod_name, NAMESPACE)
    continue_task(make_task(), deferred, event, task_context(plan))
    assert cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"] == "12Gi"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(("status", "api_message"), [(403, NOT_PERMITTED), (401, "Unauthorized")])
def test_an_api_server_that_starts_and_refuses_the_account_twice_costs_no_try(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], method: str, status: int, api_message: str
) -> None:
    cluster.emulator.rejections[method] = (status, api_message)
    cluster.emulator.rejection_counts[method] = 2
    run_until_deferred(make_task(), task_context(plan))
    cluster.emulator.rejections.clear()
    assert len(cluster.pods()) == 1


def test_a_refused_token_is_not_explained_by_the_roles(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    cluster.emulator.rejections["POST"] = (401, "Unauthorized")
    message, is_retried = failure_of(lambda: make_task().execute(task_context(plan)))
    assert message.startswith("config or usage error (12): the Kubernetes API does not accept Airflow's token")
    assert "rbac.yaml" not in message
    assert not is_retried


def test_a_log_that_the_node_has_removed_is_not_quoted_and_its_pod_is_kept(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.emulator.logs[deferred.trigger.pod_name] = LOG_IS_GONE
    cluster.end_container(1, termination_message=LOG_IS_GONE)
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert (message, is_retried) == ("internal error (1)", False)
    assert len(cluster.pods()) == 1
    assert f"the pod's log cannot be read: {LOG_IS_GONE}" in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["removed", "refused"])
def test_what_is_no_log_is_not_copied_as_one_while_the_pod_is_followed(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], failure: str
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.emulator.logs[deferred.trigger.pod_name] = LOG_IS_GONE
    cluster.emulator.logs_fail = failure == "refused"
    cluster.start_container()
    event = event_while(cluster, deferred, lambda: None, is_ended=lambda: cluster.end_container(75))
    assert (event["status"], event["last_log_time"]) == ("failed", None)
    assert event["observation"]["last_lines"] == []


def test_a_clock_that_is_ahead_loses_no_log(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    ahead = datetime.now(UTC) + timedelta(minutes=5)
    cluster.start_container()
    cluster.emulator.logs[deferred.trigger.pod_name] = "2026-01-31T03:01:02.5Z epoch 3\n"
    deferred.trigger.last_log_time = ahead
    event = event_while(cluster, deferred, lambda: None, is_ended=lambda: cluster.end_container(1))
    assert event["observation"]["last_lines"] == ["epoch 3"]

    event["last_log_time"] = ahead
    capsys.readouterr()
    failure_of(lambda: make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan)))
    assert "epoch 3" in capsys.readouterr().out
    assert cluster.pods() == []


@pytest.mark.parametrize(("status", "warning"), [(404, ""), (500, "could not be marked as checked: 500: no")])
def test_a_pod_that_goes_before_it_is_marked_leaves_no_traceback(
    cluster: FakeCluster,
    plan: Plan,
    make_task: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    status: int,
    warning: str,
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.end_container(75)
    cluster.emulator.rejections["PATCH"] = (status, "no")
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert (message, is_retried) == ("try again (75)", True)
    printed = capsys.readouterr().out
    assert [record for record in caplog.records if record.exc_info] == []
    assert "HTTP response" not in printed
    assert warning in printed


def test_a_log_request_without_an_answer_does_not_end_the_waiting(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_retrain.runtimes.airflow import pod_trigger

    monkeypatch.setattr(pod_trigger, "_LOG_TIMEOUT_SECONDS", 0.5)
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    cluster.emulator.logs_hang = True
    event = event_while(cluster, deferred, lambda: None, is_ended=lambda: cluster.end_container(75))
    assert event["status"] == "failed"
    assert event["observation"]["followed_seconds"] > 1
    assert ("get", "pods/log") in cluster.emulator.used_verbs


def test_a_triggerer_that_followed_the_pod_for_a_while_begins_to_count_anew(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    observation = {"pod": None, "last_lines": [], "followed_seconds": 900.0}
    event = event_of(deferred, _redefer_count=3, observation=observation)
    deferred_again = continue_task(make_task(), deferred, event, task_context(plan))
    assert deferred_again.trigger.trigger_kwargs["_redefer_count"] == 1
    assert cluster.created_count() == 1
