"""The Kubernetes operator against the API over HTTP: a pod that no try follows is deleted, and its log stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import failure_of, resume, run_until_deferred, task_context

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]


@pytest.mark.slow
def test_a_pod_that_did_the_work_while_nobody_looked_is_removed_and_its_log_is_in_the_tasks(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_until_deferred(make_task(), task_context(plan))
    assert cluster.run_step() == 0
    make_task().execute(task_context(plan, try_number=2))
    assert (cluster.created_count(), cluster.pods()) == (1, [])
    assert "validate_data: done: " in capsys.readouterr().out

    cluster.emulator.rejections["GET"] = (500, "etcdserver: request timed out")
    make_task().execute(task_context(plan, try_number=3))
    assert "may be left" in capsys.readouterr().out, "the artifact is complete, whatever the API answers"


@pytest.mark.slow
@pytest.mark.parametrize("task_sees_the_end", [True, False])
def test_a_step_that_refuses_leaves_no_pod(
    cluster: FakeCluster,
    plan_in: Callable[..., Plan],
    make_task: Callable[..., Any],
    tmp_path: Path,
    task_sees_the_end: bool,
) -> None:
    plan = plan_in((tmp_path / "store").as_uri(), "data.min_train_rows=100000")
    deferred = run_until_deferred(make_task(), task_context(plan))
    assert cluster.run_step() == 10
    message, is_retried = failure_of(
        lambda: (
            resume(deferred, make_task(), task_context(plan))
            if task_sees_the_end
            else make_task().execute(task_context(plan, try_number=2))
        )
    )
    assert (message.startswith("data refused (10): "), is_retried) == (True, False)
    assert (cluster.created_count(), cluster.pods()) == (1, [])


@pytest.mark.parametrize("exit_code", [1, 12, 13, 14])
def test_a_pod_that_no_try_follows_is_removed_when_its_log_is_in_the_tasks(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.emulator.logs[deferred.trigger.pod_name] = "epoch 3\nvalidate_data: it said why\n"
    cluster.end_container(exit_code)
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert (message.endswith("validate_data: it said why\nbefore that: epoch 3"), is_retried) == (True, False)
    assert cluster.pods() == []
    assert "epoch 3" in capsys.readouterr().out


def test_a_pod_is_kept_for_the_next_try_and_removed_after_the_last_one(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    for try_number, pod_count in ((1, 1), (2, 1), (3, 0)):
        deferred = run_until_deferred(make_task(), task_context(plan, try_number, total_tries=3))
        cluster.end_container(75)
        _, is_retried = failure_of(
            lambda deferred=deferred, try_number=try_number: resume(
                deferred, make_task(), task_context(plan, try_number, total_tries=3)
            )
        )  # type: ignore[misc]
        assert (is_retried, len(cluster.pods())) == (True, pod_count)


def test_a_failed_pod_whose_log_cannot_be_read_is_kept_with_it_until_somebody_clears_the_task(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.end_container(1)
    cluster.emulator.logs_fail = True
    _, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert (is_retried, len(cluster.pods())) == (False, 1)
    run_until_deferred(make_task(), task_context(plan, try_number=2))
    assert (cluster.created_count(), len(cluster.pods())) == (2, 1)
