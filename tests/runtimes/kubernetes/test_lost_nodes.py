"""The Kubernetes operator against the API over HTTP: a node that is lost while the cluster still shows its pod."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.core.errors import Cause
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import (
    failure_of,
    rebuild_trigger,
    resume,
    run_until_deferred,
    task_context,
    wait_for_looks,
    written_ending,
)

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]
# What the cluster shows of a pod on a lost node: not ready for five minutes, from then on "being deleted".
LOST_NODE_STATES = ["lose_node", "overstay_deletion"]


@pytest.mark.parametrize("lost_node_state", LOST_NODE_STATES)
def test_a_pod_whose_node_is_lost_is_given_up_after_ten_minutes_and_another_takes_its_place(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], lost_node_state: str
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    pod_name = deferred.trigger.pod_name
    getattr(cluster, lost_node_state)(minutes=11)

    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert message.startswith("try again (75): ")
    assert message.endswith(" UTC: node lost")
    assert is_retried
    assert (cluster.created_count(), cluster.emulator.force_deleted) == (1, []), "nothing goes before another comes"

    run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert (cluster.created_count(), cluster.emulator.force_deleted) == (2, [pod_name])
    assert cluster.pod()["status"]["phase"] == "Pending"


@pytest.mark.parametrize("lost_node_state", LOST_NODE_STATES)
def test_a_worker_that_dies_with_the_node_leaves_a_pod_that_the_next_try_replaces_at_once(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], lost_node_state: str
) -> None:
    run_until_deferred(make_task(), task_context(plan))
    getattr(cluster, lost_node_state)(minutes=11)
    run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert cluster.created_count() == 2


def test_a_node_that_is_silent_for_a_few_minutes_may_come_back_and_its_pod_is_followed(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.lose_node(minutes=9)

    async def fires_within_a_second() -> bool:
        event = asyncio.create_task(anext(rebuild_trigger(deferred).run()))
        await asyncio.sleep(1)
        has_fired = event.done()
        event.cancel()
        return has_fired

    assert not asyncio.run(fires_within_a_second())

    # Again, so that the minute that is left does not depend on how long all this took.
    cluster.lose_node(minutes=9)
    deferred = run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert (cluster.created_count(), cluster.emulator.force_deleted) == (1, [])
    cluster.end_container(14, termination_message=written_ending(14, Cause.DIVERGED, "the loss is nan"))
    message, _ = failure_of(lambda: resume(deferred, make_task(), task_context(plan, try_number=2)))
    assert message == "training diverged (14): the loss is nan"


def test_a_container_that_is_not_ready_for_an_hour_because_it_ended_keeps_its_own_exit_code(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.lose_node(minutes=60)
    cluster.end_container(12, termination_message=written_ending(12, Cause.USAGE, "no"))
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert (message, is_retried) == ("config or usage error (12): no", False)


def test_a_log_that_cannot_be_read_for_a_while_costs_no_try(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.start_container()
    cluster.emulator.logs_fail = True

    async def event_status() -> str:
        trigger = rebuild_trigger(deferred)
        trigger.logging_interval = 0.1  # seconds, so that it reads the log several times while the API fails
        event = asyncio.create_task(anext(trigger.run()))
        await wait_for_looks(cluster, 4)
        assert not event.done(), "it waits on"
        cluster.end_container(75)
        return str((await asyncio.wait_for(event, 90)).payload["status"])

    assert asyncio.run(event_status()) == "failed"
    assert ("get", "pods/log") in cluster.emulator.used_verbs
