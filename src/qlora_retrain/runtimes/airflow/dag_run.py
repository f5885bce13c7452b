"""What an Airflow task knows of its DAG run: the store, the run's id there, the plan, and who started it.

Environment: `QLORA_RETRAIN_ROOT`, the store's URI; without it, `.state/store` in the project's folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from qlora_retrain.core import graph
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes.airflow import form_fields

if TYPE_CHECKING:
    from airflow.sdk import Context

_log = logging.getLogger(__name__)
ROOT_VARIABLE = "QLORA_RETRAIN_ROOT"
# Twice what a note holds, where further texts may stand.
MAX_NOTE_CHARACTERS = 2000
# Airflow's names of the types of runs. Any other was asked for: by hand, by REST, or by a task of another DAG.
_SCHEDULED_TYPES = ("scheduled", "asset_triggered", "backfill")


def store_root() -> str:
    """Return the store's URI: the environment's, or the project's own folder."""
    return os.environ.get(ROOT_VARIABLE) or (code_identity.project_root() / ".state" / "store").as_uri()


def own_run_id(context: Context) -> str:
    """Return the DAG run's own id in the store; it is the same for every task and every try.

    It is made from `run_after`, which every DAG run has. A run that an asset started has no logical date.
    """
    return run_id_of(context["dag_run"])


def run_id_of(dag_run: Any) -> str:
    """Return the id in the store of a DAG run, as a task's context or Airflow's database has it."""
    from qlora_retrain.pipeline import plan

    # `run_after` and both ids stay the same when tasks are cleared, so a cleared run finds its plan.
    return plan.run_id(dag_run.run_after, dag_run.dag_id, dag_run.run_id)


def plan_run_id(context: Context) -> str:
    """Return the id of the run whose plan the task runs by: the DAG run's own, or the one that its form names.

    A task of a lab has a plan of its own.
    """
    if is_of_lab(context):
        return PurePosixPath(urlsplit(plan_uri(context)).path).parent.name
    return str(context["params"].get(form_fields.RESUME_RUN) or own_run_id(context))


def plan_uri(context: Context) -> str:
    """Return the URI of the plan, with its hash, as task 0 of this DAG run returned it.

    Task 0 of a lab left lists of plans. A mapped task has the one of its place, any other the first.

    Raises:
        UsageError: If task 0 has left none.
    """
    task_instance = context["ti"]
    if key := _plans_key(context):
        plans = task_instance.xcom_pull(task_ids=graph.PLAN_TASK, key=key) or []
        number = max(task_instance.map_index, 0)
        uri = plans[number] if number < len(plans) else None
    else:
        uri = task_instance.xcom_pull(task_ids=graph.PLAN_TASK)
    if not uri:
        raise UsageError(f"task {graph.PLAN_TASK} of this run has left no plan; clear that task, and the run goes on")
    return str(uri)


def is_of_lab(context: Context) -> bool:
    """Return whether the task is one of a lab, which compares settings and publishes nothing."""
    return _plans_key(context) is not None


def _plans_key(context: Context) -> str | None:
    """Return under which key task 0 of a lab has left the plans of a task; None: the DAG run has one plan."""
    key: str | None = getattr(context.get("task"), "plans_key", None)
    return key


def actor_name(user: str) -> str:
    """Return a user of Airflow as the audit trail names them."""
    return f"airflow:{quote(user, safe='@+')}"


def is_started_by_schedule(context: Context) -> bool:
    """Return whether nobody asked for this run: a time, new data or a backfill of such times started it."""
    run_type = getattr(context["dag_run"], "run_type", None)
    return getattr(run_type, "value", run_type) in _SCHEDULED_TYPES


def actor_arguments(context: Context) -> list[str]:
    """Return who started the run, for the audit trail: the user whom Airflow's API authenticated.

    It never comes from the run's form or its `conf`, which whoever triggers a run writes.
    """
    dag_run = context["dag_run"]
    if user := getattr(dag_run, "triggering_user_name", None):
        return ["--triggered-by", actor_name(user)]
    # Nobody: a schedule or an asset. Another system's name, so that no user can be called so.
    run_type = getattr(dag_run, "run_type", "unknown")
    return ["--triggered-by", f"airflow-run:{getattr(run_type, 'value', run_type)}"]


def publish_arguments(context: Context) -> list[str]:
    """Return who started the run, and the reason that the form has, for the audit trail."""
    # Percent-encoded: Kubernetes puts a variable's value in place of `$(NAME)`, also in a person's text.
    reason = quote(form_fields.stated_reason(context["params"]), safe="")
    return [*actor_arguments(context), *([f"--reason={reason}"] if reason else [])]


def push_note(context: Context, compose: Callable[[], str]) -> None:
    """Leave the text that `compose` returns for the note of the task's run; `run_notes.py` writes it there.

    Whatever goes wrong, the task ends as it would without a note.
    """
    try:
        context["ti"].xcom_push(key=form_fields.NOTE_KEY, value=compose()[:MAX_NOTE_CHARACTERS])
    except Exception as error:  # noqa: BLE001 - also of a document that another version wrote
        _log.warning("the run's note lacks a text: %s", error if isinstance(error, Problem) else type(error).__name__)
