"""What Airflow does with a task that waits in the triggerer: each part as the process does it that has it.

The trigger is Airflow's own, made from what was serialized, as the triggerer does it.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_retrain.pipeline.plan import Plan


def context(made: Plan, tries: int = 1, most: int = 9) -> dict[str, Any]:
    """The context of a task's try, of so many at most."""
    run = SimpleNamespace(dag_id="tickets", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    return {
        "dag_run": run,
        "params": {"plan_uri": made.uri},
        "ti": SimpleNamespace(try_number=tries, max_tries=most - 1),
    }


def begin(task: Any, run: dict[str, Any]) -> Any:
    """Run the task up to where it leaves the worker."""
    from airflow.sdk.exceptions import TaskDeferred

    with pytest.raises(TaskDeferred) as left:
        task.execute(run)
    return left.value


def trigger_of(left: Any) -> Any:
    """The trigger as another process makes it: from its name and arguments."""
    path, arguments = left.trigger.serialize()
    module, _, name = path.rpartition(".")
    trigger = getattr(importlib.import_module(module), name)(**arguments)
    trigger.startup_check_interval = 0.1
    return trigger


def event_of(left: Any) -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        trigger = trigger_of(left)
        async for event in trigger.run():
            payload: dict[str, Any] = event.payload
            return payload
        raise AssertionError("the trigger said nothing")

    return asyncio.run(first())


def go_on(left: Any, task: Any, run: dict[str, Any]) -> None:
    """Wait in the trigger, then take the task up in a process that knows nothing of the first."""
    task.resume_execution(left.method_name, {"event": event_of(left)}, run)


def ends(run: Callable[[], object]) -> tuple[str, bool]:
    """How a task ends that fails: what it says, and whether Airflow tries it again."""
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException) as caught:
        run()
    return str(caught.value), not isinstance(caught.value, AirflowFailException)
