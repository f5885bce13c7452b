"""The life of a deferrable task, one function for each part: worker, triggerer, worker again.

The trigger is Airflow's own. It is rebuilt from its serialized form, as the triggerer does it.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause
from qlora_retrain.pipeline.plan import Plan

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster


def task_context(plan: Plan, try_number: int = 1, total_tries: int = 9) -> dict[str, Any]:
    """Make the context of one try of a task."""
    dag_run = SimpleNamespace(dag_id="tickets", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    return {
        "dag_run": dag_run,
        "params": {"resume_run": plan.run_id},
        "ti": SimpleNamespace(
            try_number=try_number, max_tries=total_tries - 1, xcom_pull=lambda task_ids: {"plan": plan.uri}[task_ids]
        ),
    }


def run_until_deferred(task: Any, context: dict[str, Any]) -> Any:
    """Run the task up to the point where it leaves the worker; return the TaskDeferred that it raised."""
    from airflow.sdk.exceptions import TaskDeferred

    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context)
    return deferred.value


def rebuild_trigger(deferred: Any) -> Any:
    """Make the trigger as another process does: from its class name and arguments."""
    path, arguments = deferred.trigger.serialize()
    module, _, name = path.rpartition(".")
    trigger = getattr(importlib.import_module(module), name)(**arguments)
    trigger.startup_check_interval = 0.1  # seconds
    return trigger


def first_event(deferred: Any) -> dict[str, Any]:
    """Run the trigger until it fires; return its event."""

    async def first() -> dict[str, Any]:
        trigger = rebuild_trigger(deferred)
        async for event in trigger.run():
            payload: dict[str, Any] = event.payload
            return payload
        raise AssertionError("the trigger ended without an event")

    return asyncio.run(first())


async def wait_for_looks(cluster: FakeCluster, times: int = 2) -> None:
    """Wait until a trigger has asked so many times more for the pod and for its log.

    The second time of both it has dealt with what it got at the first, however slow the machine is.
    """
    counts = cluster.emulator.counts
    ends = {request: counts[request] + times for request in (("get", "pods"), ("get", "pods/log"))}
    while any(counts[request] < end for request, end in ends.items()):
        await asyncio.sleep(0.05)


def resume(deferred: Any, task: Any, context: dict[str, Any]) -> None:
    """Wait in the trigger, then resume the task as a process does that knows nothing of the first."""
    task.resume_execution(deferred.method_name, {"event": first_event(deferred)}, context)


def written_ending(exit_code: int, cause: Cause, reason: str) -> str:
    """Write what a step leaves in its pod's termination log."""
    return Ending(exit_code, cause, reason, "validate_data", "ab" * 32, "attempt-1").as_json()


def failure_of(run: Callable[[], object]) -> tuple[str, bool]:
    """Run a task that must fail; return its message, and whether Airflow would retry it."""
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException) as caught:
        run()
    return str(caught.value), not isinstance(caught.value, AirflowFailException)
