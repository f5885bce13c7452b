"""The Kubernetes operator against the API over HTTP: how often it tries, and what a try learns from the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.core import graph
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import begin, context, ends, go_on

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]
EVICTED = {"reason": "Evicted", "message": "The node was low on resource: memory."}


def memory(cluster: Cluster) -> str:
    return str(cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"])


@pytest.fixture
def after(cluster: Cluster, made: Plan, step: Callable[..., Any]) -> Callable[..., tuple[str, bool, str]]:
    """One more try, whose pod ends so: what is said, whether there is another, and the memory that the pod had."""
    tries = iter(range(1, 100))

    def end(code: int, *, light: dict[str, Any], **status: Any) -> tuple[str, bool, str]:
        number = next(tries)
        left = begin(step(light=light), context(made, number))
        had = memory(cluster)
        cluster.ends(code, **status)
        return *ends(lambda: go_on(left, step(light=light), context(made, number))), had

    return end


@pytest.mark.parametrize("name", [step.name for step in graph.STEPS])
def test_the_tries_outlast_half_an_hour_of_full_quota_and_wait_for_no_more_than_ten_minutes(
    step: Callable[..., Any], name: str
) -> None:
    from airflow.models.taskinstance import TaskInstance

    task = step(name)
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
    assert minutes[0] <= 0.5, "what passes at once is not waited for"
    assert max(minutes) <= 10
    assert task.retries >= graph.step(name).retries


def test_a_pod_that_is_killed_for_memory_where_there_is_no_more_gets_one_plain_try(
    after: Callable[..., tuple[str, bool, str]],
) -> None:
    light = {"memory_gib": 8}
    said, again, _ = after(137, light=light, because="OOMKilled")
    assert (again, "its limit was 8 GiB, the next try gets the same, once (no max_memory_gib)" in said) == (True, True)
    said, again, had = after(137, light=light, because="OOMKilled")
    assert said.startswith(
        "killed for memory (137): its limit was 8 GiB, as the last time: set memory_gib and max_memory"
    )
    assert (again, had) == (False, "8Gi")
    said, again, had = after(137, light={"memory_gib": 16}, because="OOMKilled")
    assert (again, had) == (True, "16Gi"), "whoever gives it more and clears the task begins anew"


def test_an_eviction_in_between_forgets_neither_the_kill_nor_the_memory_that_was_given(
    after: Callable[..., tuple[str, bool, str]],
) -> None:
    growing = {"memory_gib": 8, "max_memory_gib": 32}
    assert after(137, light=growing, because="OOMKilled")[1:] == (True, "8Gi")
    assert after(137, light=growing, **EVICTED)[1:] == (True, "12Gi")
    assert after(137, light=growing, **EVICTED)[1:] == (True, "12Gi")
    fixed = {"memory_gib": 12}
    assert after(137, light=fixed, because="OOMKilled")[1:] == (True, "12Gi")
    assert after(137, light=fixed, **EVICTED)[1:] == (True, "12Gi")
    assert after(137, light=fixed, because="OOMKilled")[1:] == (False, "12Gi")


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
    said, again, _ = after(139, light=light)
    assert said.startswith("ended by signal 11 (139): 3 times by now")
    assert not again
