"""What `publish.mirror` adds to the DAG of a line, and `mirrors` of platform.yaml to the DAGs that move an alias."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.config import platform
from qlora_retrain.runtimes.airflow.notifications import free_ids

if TYPE_CHECKING:
    from airflow.sdk import DAG, BaseOperator

    from qlora_retrain.config.line import LineConfig

_DOC = (
    "Makes sure that `{to}` has the version that `production` names. It is tried again, here and after the next run, "
    "and changes neither the store nor how this run ends."
)


def add_tasks(dag: DAG, config: LineConfig, last: BaseOperator) -> None:
    """Add a task for each mirror of a line, after its last step.

    Args:
        dag: The DAG.
        config: The line.
        last: The task after which they run, however it ended.

    Raises:
        UsageError: If platform.yaml does not allow one of them.
    """
    entries = platform.load().mirrors_of(config)
    if not entries:
        return

    from qlora_retrain.runtimes.airflow.mirror_operators import MirrorOperator

    for entry in entries:
        name = re.sub(r"[^A-Za-z0-9]+", "-", entry.to)
        task = MirrorOperator(
            entry=entry,
            line=config.line,
            task_id=next(free_ids(dag, f"mirror_{name}")),
            doc_md=_DOC.format(to=entry.to),
            dag=dag,
        )
        last >> task.as_teardown()


def add_move_tasks(dag: DAG, last: BaseOperator, pipelines: Path) -> None:
    """Add the task for the mirrors to a DAG in which a person moves an alias of any line, after the move."""
    if platform.load().mirrors:
        from qlora_retrain.runtimes.airflow.mirror_operators import MoveMirrorsOperator

        last >> MoveMirrorsOperator(task_id="mirrors", pipelines=pipelines, dag=dag).as_teardown()
