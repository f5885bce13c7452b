"""Which run of the store a DAG run is, and what there is to show of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qlora_retrain.core import graph
from qlora_retrain.core.errors import describe
from qlora_retrain.pipeline import run_page, status
from qlora_retrain.pipeline.plan import Plan, plan_path, plan_uri
from qlora_retrain.runtimes.airflow import form_fields
from qlora_retrain.runtimes.airflow.dag_run import run_id_of, store_root
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import NotFound

RUN_TAB = "Run"
# The reports of a run in the order in which a person reads them, by the artifact that holds each.
_TABS = {"Data": "dataset", "Training": "adapter", "Evaluation": "evaluation", "Certificate": "model"}
_STORE_RUN_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Tab:
    """A report of a run.

    Attributes:
        title: What the tab is called.
        task: The task whose page it shows.
        missing: Why there is no report yet; empty where there is one.
    """

    title: str
    task: str
    missing: str = ""


def plan_of(dag_run: Any) -> Plan | None:
    """Return the plan by which a DAG run ran; None where it has none, or one of another line.

    It is found by the DAG run's own id, or by the id of the run that its form said to finish. No address is taken from
    the form or from XCom, which others may write.
    """
    root, run_id = store_root(), _store_run_id(dag_run)
    try:
        open_store(root).read_start(plan_path(run_id), 1)
    except NotFound:
        return None
    plan = Plan.read(plan_uri(root, run_id))
    return plan if plan.line == dag_run.dag_id else None


def tabs_of(plan: Plan) -> list[Tab]:
    """Return the tabs of a run: its page, then a report for each artifact that has one for people."""
    tabs = [Tab(RUN_TAB, graph.PLAN_TASK)]
    for title, artifact_name in _TABS.items():
        step = graph.producer_name(artifact_name)
        manifest = status.find_manifest(plan, step)
        failure = None if manifest else run_page.last_failure(plan, step)
        missing = "" if manifest else f"{step}: {describe(failure.code) if failure else 'no report yet'}"
        tabs.append(Tab(title, step, missing))
    return tabs


def task_page(plan: Plan, task_id: str) -> bytes | None:
    """Return the report of a task; the run's page where it has written none; None for an unknown task."""
    names = {step.name: step for step in graph.STEPS}
    if task_id != graph.PLAN_TASK and task_id not in names:
        return None
    has_report = task_id in names and names[task_id].report is not None
    report = run_page.step_report(plan, task_id) if has_report else None
    return run_page.page(plan).encode() if report is None else report


def _store_run_id(dag_run: Any) -> str:
    conf = dag_run.conf if isinstance(dag_run.conf, dict) else {}
    resumed = conf.get(form_fields.RESUME_RUN)
    is_id = isinstance(resumed, str) and _STORE_RUN_ID.fullmatch(resumed)
    return str(resumed) if is_id else run_id_of(dag_run)
