"""An Airflow listener: import in the scheduler what the tasks need, since LocalExecutor's tasks are copies of it.

So each task of a run begins a third of a second earlier. Other executors start tasks in processes of their own, which
import by themselves, and nothing changes for them. Nothing of a line is read here.
"""

from __future__ import annotations

import importlib

from airflow.listeners import hookimpl

_MODULES = (
    "qlora_retrain.config.line",
    "qlora_retrain.pipeline.execute",
    "qlora_retrain.pipeline.make_plan",
    "qlora_retrain.runtimes.airflow.mirrors",
    "qlora_retrain.runtimes.airflow.notifications",
    "qlora_retrain.runtimes.airflow.request_approval",
    "qlora_retrain.runtimes.airflow.step_tasks",
)


@hookimpl  # type: ignore[untyped-decorator]
def on_starting(component: object) -> None:
    """Import the modules, where one of Airflow's services starts and not a task."""
    from airflow.configuration import conf
    from airflow.jobs.job import Job

    if isinstance(component, Job) and "LocalExecutor" in conf.get("core", "executor"):
        for module in _MODULES:
            importlib.import_module(module)
