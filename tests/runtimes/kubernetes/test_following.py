"""The Kubernetes operator against the API over HTTP: one pod for a step, made, followed, waited for and deleted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes import canaries
from tests.runtimes.kubernetes.tasks import begin, context, ends, event_of, go_on, trigger_of

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]


@pytest.mark.slow
@pytest.mark.parametrize("because", ["Completed", "OOMKilled"], ids=["plainly", "after a kill of one of its processes"])
def test_a_pod_does_the_work_once_and_is_deleted_and_a_made_artifact_needs_no_pod(
    cluster: Cluster, made: Plan, step: Callable[..., Any], because: str
) -> None:
    left = begin(step(), context(made))
    assert cluster.does_the_work(because=because) == 0
    go_on(left, step(), context(made))
    assert cluster.pods() == []
    step().execute(context(made, tries=2))  # made already: nothing to do
    assert cluster.pods() == []
    assert cluster.created() == 1
    from qlora_retrain.pipeline import execute

    assert execute.found(made, "validate_data") == 0


def test_a_worker_that_dies_leaves_a_pod_that_the_next_try_follows(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    begin(step(), context(made))  # and its worker, scheduler or triggerer is gone with all it knew
    cluster.runs()
    left = begin(step(), context(made, tries=2))
    assert cluster.created() == 1
    cluster.ends(12, said="validate_data: config or usage (12): the same one ended")
    said, again = ends(lambda: go_on(left, step(), context(made, tries=2)))
    assert (again, "the same one ended" in said) == (False, True)
    assert cluster.created() == 1


def test_an_answer_that_is_lost_after_the_pod_was_made_makes_no_second_one(
    cluster: Cluster, made: Plan, step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(step(), context(made))
    task = step()
    monkeypatch.setattr(task, "_earlier", lambda: None)  # looked before the first one was there
    left = begin(task, context(made))
    assert left.trigger.pod_name == cluster.pod()["metadata"]["name"]
    assert len(cluster.pods()) == 1


def test_a_pod_that_ended_while_nobody_looked_is_judged_and_not_run_again(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    begin(step(), context(made))
    cluster.ends(14, said="validate_data: training diverged (14): nan")
    said, again = ends(lambda: step().execute(context(made, tries=2)))
    assert (said, again) == ("validate_data: training diverged (14): nan", False)
    assert cluster.created() == 1
    # It was judged: whoever clears the task wants another try.
    begin(step(), context(made, tries=3))
    assert cluster.created() == 2
    assert len(cluster.pods()) == 1


def test_killing_a_task_in_the_worker_deletes_its_pod(cluster: Cluster, made: Plan, step: Callable[..., Any]) -> None:
    task = step()
    begin(task, context(made))
    task.on_kill()
    assert cluster.pods() == []


def test_killing_a_deferred_task_deletes_its_pod_and_a_triggerer_that_stops_does_not(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.runs()
    asyncio.run(trigger_of(left).cleanup())  # what a triggerer does that goes away
    assert len(cluster.pods()) == 1
    asyncio.run(trigger_of(left).on_kill())  # what it does when somebody fails or clears the task
    assert cluster.pods() == []


def test_a_triggerer_in_the_cluster_finds_it_by_its_service_account(
    cluster_within: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    cluster = cluster_within
    left = begin(step(), context(made))
    assert "canary" not in str(left.trigger.serialize())

    async def status() -> str:
        event = asyncio.create_task(anext(trigger_of(left).run()))
        # asyncio loses a connection that is given up while it is being secured: not before the last one is
        while ("watch", "events") not in cluster.emulator.verbs and not event.done():
            await asyncio.sleep(0.1)
        cluster.ends(12)
        return str((await event).payload["status"])

    assert asyncio.run(status()) == "failed", "the trigger saw it end"
    asyncio.run(trigger_of(left).on_kill())
    assert cluster.pods() == []
    seen = {request.headers.get("Authorization", "").partition(" ")[2] for request in cluster.emulator}
    assert seen == {"", canaries.SERVICE_ACCOUNT}, "the test itself, and nobody else, is without"


def test_a_pod_that_still_saves_is_waited_for_and_there_are_never_two(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    cluster.emulator.graceful = True
    task = step()
    begin(task, context(made))
    cluster.runs()
    task.on_kill()
    assert cluster.pod()["metadata"]["deletionTimestamp"]
    most = []
    letting_go = threading.Timer(2, cluster.removes)
    letting_go.start()
    started = time.monotonic()
    begin(step(), context(made, tries=2))
    most.append(len(cluster.pods()))
    letting_go.join()
    assert time.monotonic() - started > 1.5
    assert most == [1]


def test_a_pod_that_began_when_it_was_just_given_up_is_followed(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import TaskDeferred

    left = begin(step(), context(made))
    cluster.runs()
    event = {"status": "timeout", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "too long"}
    with pytest.raises(TaskDeferred) as again:
        step().resume_execution(left.method_name, {"event": event}, context(made))
    assert (cluster.created(), len(cluster.pods())) == (1, 1)
    cluster.ends(75)
    assert event_of(again.value)["status"] == "failed"


def test_a_lost_pod_is_made_again(cluster: Cluster, made: Plan, step: Callable[..., Any]) -> None:
    left = begin(step(), context(made))
    event = {"status": "error", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "404"}
    cluster.api.delete_namespaced_pod(left.trigger.pod_name, "qlora-retrain")
    said, again = ends(lambda: step().resume_execution(left.method_name, {"event": event}, context(made)))
    assert "the pod is gone: its node was lost" in said
    assert again
    begin(step(), context(made, tries=2))
    assert len(cluster.pods()) == 1


def test_a_pod_that_the_triggerer_lost_sight_of_is_followed_on(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import AirflowException, TaskDeferred

    left = begin(step(), context(made))
    cluster.runs()
    event = {"status": "error", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "503"}
    for _ in range(3):
        with pytest.raises(TaskDeferred) as again:
            step().resume_execution(left.method_name, {"event": event}, context(made))
        event = {**event, **again.value.trigger.trigger_kwargs}
    with pytest.raises(AirflowException, match="cannot follow the pod"):
        step().resume_execution(left.method_name, {"event": event}, context(made))
    assert cluster.created() == 1
