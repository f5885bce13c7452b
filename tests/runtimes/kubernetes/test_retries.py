"""The Kubernetes operator against the API over HTTP: how often it retries, and what a try learns from the last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.core import graph
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import failure_of, resume, run_until_deferred, task_context

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]
EVICTED = {"reason": "Evicted", "message": "The node was low on resource: memory."}


def memory_limit(cluster: FakeCluster) -> str:
    return str(cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"])


@pytest.fixture
def after(cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]) -> Callable[..., tuple[str, bool, str]]:
    """Run the next try, whose pod ends in the given way.

    It returns the task's message, whether there will be another try, and the memory limit that the pod had.
    """
    try_numbers = iter(range(1, 100))

    def run_try(exit_code: int, *, light: dict[str, Any], **status: Any) -> tuple[str, bool, str]:
        number = next(try_numbers)
        deferred = run_until_deferred(make_task(light=light), task_context(plan, number))
        limit = memory_limit(cluster)
        cluster.end_container(exit_code, **status)
        return *failure_of(lambda: resume(deferred, make_task(light=light), task_context(plan, number))), limit

    return run_try


@pytest.mark.parametrize("name", [step.name for step in graph.STEPS])
def test_the_tries_outlast_half_an_hour_of_full_quota_and_wait_for_no_more_than_ten_minutes(
    make_task: Callable[..., Any], name: str
) -> None:
    from airflow.models.taskinstance import TaskInstance

    task = make_task(name)
    # Airflow computes the delay from a task instance; these are the fields that it reads.
    now = datetime(2026, 1, 31, 3, tzinfo=UTC)
    ids = {"dag_id": "tickets", "task_id": name, "logical_date": now, "log": logging.getLogger(name)}
    waits = [
        TaskInstance.next_retry_datetime(
            SimpleNamespace(**ids, task=task, try_number=number, end_date=now, retry_delay_override=None)
        )
        - now
        for number in range(1, task.retries + 1)
    ]

    minutes = [wait.total_seconds() / 60 for wait in waits]
    assert sum(minutes) > 30
    assert minutes[0] <= 0.5, "what passes soon is retried soon"
    assert max(minutes) <= 10
    assert task.retries >= graph.step(name).retries


def test_a_pod_that_is_killed_for_memory_where_there_is_no_more_gets_one_plain_try(
    after: Callable[..., tuple[str, bool, str]],
) -> None:
    light = {"memory_gib": 8}
    message, is_retried, _ = after(137, light=light, container_reason="OOMKilled")
    assert (
        is_retried,
        "its limit was 8 GiB; the next try gets the same, once, because max_memory_gib is not set" in message,
    ) == (
        True,
        True,
    )
    message, is_retried, limit = after(137, light=light, container_reason="OOMKilled")
    assert message.startswith(
        "out of memory (137): its limit was 8 GiB, as in an earlier try; set memory_gib and max_memory"
    )
    assert (is_retried, limit) == (False, "8Gi")
    message, is_retried, limit = after(137, light={"memory_gib": 16}, container_reason="OOMKilled")
    assert (is_retried, limit) == (True, "16Gi"), "whoever gives it more and clears the task begins anew"


def test_an_eviction_in_between_forgets_neither_the_kill_nor_the_memory_that_was_given(
    after: Callable[..., tuple[str, bool, str]],
) -> None:
    growing = {"memory_gib": 8, "max_memory_gib": 32}
    assert after(137, light=growing, container_reason="OOMKilled")[1:] == (True, "8Gi")
    assert after(137, light=growing, **EVICTED)[1:] == (True, "12Gi")
    assert after(137, light=growing, **EVICTED)[1:] == (True, "12Gi")
    fixed = {"memory_gib": 12}
    assert after(137, light=fixed, container_reason="OOMKilled")[1:] == (True, "12Gi")
    assert after(137, light=fixed, **EVICTED)[1:] == (True, "12Gi")
    assert after(137, light=fixed, container_reason="OOMKilled")[1:] == (False, "12Gi")


def test_a_kill_that_nobody_explains_gets_no_more_memory_and_as_many_tries_as_any_other_signal(
    after: Callable[..., tuple[str, bool, str]],
) -> None:
    growing = {"memory_gib": 8, "max_memory_gib": 32}
    assert graph.step("validate_data").retries == 2
    assert [after(137, light=growing)[1:] for _ in range(3)] == [(True, "8Gi"), (True, "8Gi"), (False, "8Gi")]


def test_a_step_that_crashes_is_tried_again_as_often_as_the_graph_says_and_evictions_do_not_count(
    after: Callable[..., tuple[str, bool, str]],
) -> None:
    light = {"memory_gib": 8}
    assert graph.step("validate_data").retries == 2
    assert after(139, light=light)[1]
    assert after(137, light=light, **EVICTED)[1]
    assert after(139, light=light)[1]
    message, is_retried, _ = after(139, light=light)
    assert message.startswith("ended by signal 11 (139): 3 such ends by now")
    assert not is_retried
