"""Build the two DAGs by which a person moves an alias of any line: `qlora-retrain-move` and `qlora-retrain-approval`.

`qlora-retrain-move` promotes a version or rolls one back, as its form says; the buttons of the Models page start it.
`qlora-retrain-approval` asks whether the version in `staging` may become `production`. A line with
`publish.approval: true` starts it at the end of a run, and it can be started by hand to ask once more.

One DAG serves all lines, so that a platform with many of them parses no more files. Without Airflow:
`qlora-retrain promote LINE VERSION --from VERSION --reason TEXT`
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param

from qlora_retrain.runtimes.airflow import mirrors, notifications
from qlora_retrain.runtimes.airflow.approval import ApprovalOperator
from qlora_retrain.runtimes.airflow.move import MoveOperator
from qlora_retrain.runtimes.airflow.move_request import (
    APPROVAL_DAG,
    APPROVAL_FIELDS,
    MOVE_DAG,
    MOVE_FIELDS,
    OPTIONAL_MOVE_FIELDS,
)

PIPELINES = Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or Path(__file__).resolve().parents[1] / "pipelines")


def hand_dag(
    dag_id: str, title: str, description: str, required: Mapping[str, Any], optional: Mapping[str, Any]
) -> DAG:
    """Make a DAG that people start; `required` and `optional` are the JSON schemas of its form's fields."""
    return DAG(
        dag_id,
        dag_display_name=title,
        description=description,
        doc_md=__doc__,
        schedule=None,
        # Without a default, Airflow refuses a run that leaves the field out.
        params={
            **{name: Param(**schema) for name, schema in required.items()},
            **{name: Param(None, **schema) for name, schema in optional.items()},
        },
        # A request waits for days beside all others.
        max_active_runs=1000,
        dagrun_timeout=timedelta(days=32),
        # Nothing starts it but a person or a line, and a request must not wait unseen.
        is_paused_upon_creation=False,
        catchup=False,
        tags=["qlora-retrain", "models"],
    )


with hand_dag(
    MOVE_DAG,
    "Promote or roll back",
    "Moves an alias of a line: promotes a version, or rolls back.",
    MOVE_FIELDS,
    OPTIONAL_MOVE_FIELDS,
) as move_dag:
    move = MoveOperator(task_id="move", task_display_name="Move the alias", pipelines=PIPELINES)
    notifications.add_move_hooks(move_dag, move)
    mirrors.add_move_tasks(move_dag, move, PIPELINES)

with hand_dag(
    APPROVAL_DAG,
    "Approval of a version",
    "Asks whether the version in staging may become production.",
    APPROVAL_FIELDS,
    {},
) as approval_dag:
    approve = ApprovalOperator(task_id="approve", task_display_name="Ask an approver, then move", pipelines=PIPELINES)
    notifications.add_move_hooks(approval_dag, approve)
    mirrors.add_move_tasks(approval_dag, approve, PIPELINES)
