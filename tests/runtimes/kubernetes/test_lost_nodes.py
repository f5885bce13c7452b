"""The Kubernetes operator against the API over HTTP: a node that is lost while the cluster still shows its pod."""

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
SHOWN = ["falls_silent", "wants_gone"]  # for five minutes, and from then on


@pytest.mark.parametrize("shown", SHOWN)
def test_a_pod_whose_node_is_lost_is_given_up_after_ten_minutes_and_another_takes_its_place(
    cluster: Cluster, made: Plan, step: Callable[..., Any], shown: str
) -> None:
    left = begin(step(), context(made))
    name = left.trigger.pod_name
    getattr(cluster, shown)(minutes=11)
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert said.startswith("try again (75): ")
    assert said.endswith(" UTC: node lost")
    assert again
    assert (cluster.created(), cluster.emulator.forced) == (1, []), "nothing goes before another comes"
    begin(step(), context(made, tries=2))
    assert (cluster.created(), cluster.emulator.forced) == (2, [name])
    assert cluster.pod()["status"]["phase"] == "Pending"


@pytest.mark.parametrize("shown", SHOWN)
def test_a_worker_that_dies_with_the_node_leaves_a_pod_that_the_next_try_replaces_at_once(
    cluster: Cluster, made: Plan, step: Callable[..., Any], shown: str
) -> None:
    begin(step(), context(made))
    getattr(cluster, shown)(minutes=11)
    begin(step(), context(made, tries=2))
    assert cluster.created() == 2


def test_a_node_that_is_silent_for_a_few_minutes_may_come_back_and_its_pod_is_followed(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.falls_silent(minutes=9)

    async def fires() -> bool:
        event = asyncio.create_task(anext(trigger_of(left).run()))
        await asyncio.sleep(1)
        fired = event.done()
        event.cancel()
        return fired

    assert not asyncio.run(fires())
    left = begin(step(), context(made, tries=2))
    assert (cluster.created(), cluster.emulator.forced) == (1, [])
    cluster.ends(14, said="validate_data: training diverged (14): nan")
    said, _ = ends(lambda: go_on(left, step(), context(made, tries=2)))
    assert said == "validate_data: training diverged (14): nan"


def test_a_container_that_is_not_ready_since_long_ago_because_it_ended_is_judged_by_its_end(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.falls_silent(minutes=60)
    cluster.ends(12, said="validate_data: config or usage (12): no")
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert (said, again) == ("validate_data: config or usage (12): no", False)


def test_a_log_that_cannot_be_read_for_a_while_costs_no_try(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.runs()
    cluster.emulator.logs_fail = True

    async def status() -> str:
        trigger = trigger_of(left)
        trigger.logging_interval = 0.1
        event = asyncio.create_task(anext(trigger.run()))
        await asyncio.sleep(1.5)
        assert not event.done(), "it waits on"
        cluster.ends(75)
        return str((await asyncio.wait_for(event, 20)).payload["status"])

    assert asyncio.run(status()) == "failed"
    assert ("get", "pods/log") in cluster.emulator.verbs
