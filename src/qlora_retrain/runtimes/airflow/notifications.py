"""What `platform.yaml` adds to the DAG of a line: tasks that tell how a run ended, a deadline, a pause after failures.

A platform without `notify`, `hooks`, `deadline_hours` and `pause_after_failures` gets the DAG without them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qlora_retrain.config import platform

if TYPE_CHECKING:
    from airflow.sdk import DAG, BaseOperator


def dag_arguments(line: str, run_timeout: timedelta) -> dict[str, Any]:
    """Return what the DAG of a line gets: its deadline, and after how many failures it is paused.

    Args:
        line: The line.
        run_timeout: How long a run may take; its deadline where the platform sets none.
    """
    settings = platform.load()
    runtime = settings.runtime_of(line)
    arguments: dict[str, Any] = {}
    if runtime.pause_after_failures is not None:
        arguments["max_consecutive_failed_dag_runs"] = runtime.pause_after_failures
    if entries := [entry for entry in settings.notify_of(line) if "deadline" in entry.events]:
        # The stub file of this version of Airflow lacks them.
        from airflow.sdk import AsyncCallback, DeadlineAlert, DeadlineReference  # type: ignore[attr-defined]

        from qlora_retrain.runtimes.airflow import deadline_notice

        interval = timedelta(hours=runtime.deadline_hours) if runtime.deadline_hours else run_timeout
        arguments["deadline"] = [
            DeadlineAlert(
                reference=DeadlineReference.DAGRUN_QUEUED_AT,
                interval=interval,
                # In the triggerer, because the scheduler of an executor that runs no callbacks would end with an error.
                callback=AsyncCallback(
                    deadline_notice.tell,
                    {"line": line, "kind": entry.kind, "connection": entry.connection, "to": list(entry.to)},
                ),
            )
            for entry in entries
        ]
    return arguments


def add_tasks(dag: DAG, line: str, last: BaseOperator) -> None:
    """Add the tasks of `notify` and `hooks` to the DAG of a line, after its last step.

    Args:
        dag: The DAG.
        line: The line.
        last: The task after which they run, however it ended.
    """
    settings = platform.load()
    notify, hooks = settings.notify_of(line), settings.hooks_of(line)
    if not notify and not hooks:
        return

    from qlora_retrain.runtimes.airflow import message_pod
    from qlora_retrain.runtimes.airflow.notify_operators import NotifyOperator, ReloadHookOperator

    pod = message_pod.task_arguments()
    pause_after = settings.runtime_of(line).pause_after_failures
    for entry in notify:
        # A deadline is told while the run goes on, so no task does it.
        if set(entry.events) != {"deadline"}:
            task_id = next(free_ids(dag, f"notify_{entry.connection}"))
            task = NotifyOperator(
                entry=entry,
                line=line,
                pause_after=pause_after,
                task_id=task_id,
                task_display_name=f"Tell {entry.connection} how it ended",
                dag=dag,
                **pod,
            )
            last >> task.as_teardown()
    for hook in hooks:
        task_id = next(free_ids(dag, f"hook_{hook.connection}"))
        title = f"Tell {hook.connection} to load it"
        task = ReloadHookOperator(entry=hook, line=line, task_id=task_id, task_display_name=title, dag=dag, **pod)
        last >> task.as_teardown()


def add_move_hooks(dag: DAG, last: BaseOperator) -> None:
    """Add the task of `hooks` to a DAG in which a person moves an alias of any line, after the move."""
    if platform.load().hooks:
        from qlora_retrain.runtimes.airflow import message_pod
        from qlora_retrain.runtimes.airflow.notify_operators import MoveHooksOperator

        pod = message_pod.task_arguments()
        last >> MoveHooksOperator(task_id="hooks", task_display_name="Tell the servers", dag=dag, **pod).as_teardown()


def free_ids(dag: DAG, name: str) -> Iterator[str]:
    """Yield ids that no task of the DAG has: two emails to different people use one connection."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    return (task_id for task_id in candidates if not dag.has_task(task_id))
