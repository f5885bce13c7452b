"""The pages of a DAG run: its reports side by side, and the report of each task alone."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse, Response

from qlora_retrain.pipeline import run_page
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.airflow.ui import pages, run_reports
from qlora_retrain.runtimes.airflow.ui.access import Run
from qlora_retrain.runtimes.airflow.ui.headers import REPORT_POLICY
from qlora_retrain.runtimes.airflow.ui.pages import UrlsDep

router = APIRouter(default_response_class=HTMLResponse)


@router.get("/runs/{dag_id}/{run_id}")
def show_run(run: Run, urls: UrlsDep, tab: Annotated[str, Query(max_length=40)] = run_reports.RUN_TAB) -> HTMLResponse:
    """Show how a run ended, and one of its reports."""
    plan = _plan_of(run)
    entries = run_reports.tabs_of(plan)
    current = next((entry for entry in entries if entry.title == tab and not entry.missing), entries[0])
    links = [
        (entry.title, None if entry.missing else urls.run(run.dag_id, run.run_id, entry.title)) for entry in entries
    ]
    missing = [entry.missing for entry in entries if entry.missing]
    return HTMLResponse(
        pages.document(
            f"Reports of {run.dag_id}",
            run_page.sentence(plan),
            pages.tabs(links, current.title),
            pages.frame(urls.task(run.dag_id, run.run_id, current.task), f"{current.title} of run {plan.run_id}"),
            *([f"Without a report: {'; '.join(missing)}."] if missing else []),
            path=[pages.link(urls.models(), "Models"), pages.link(urls.line(plan.line), plan.line)],
        )
    )


@router.get("/runs/{dag_id}/{run_id}/{task_id}")
def show_task(run: Run, task_id: str) -> Response:
    """Show the report of a task, checked against its manifest; without one, the run's page."""
    page = run_reports.task_page(_plan_of(run), task_id)
    if page is None:
        raise HTTPException(404, "This DAG run has no step of this name.")
    return report_response(page)


def report_response(page: bytes) -> Response:
    """Return a report with the policy under which reports are shown."""
    return HTMLResponse(page, headers={"Content-Security-Policy": REPORT_POLICY})


def _plan_of(run: Any) -> Plan:
    plan = run_reports.plan_of(run)
    if plan is None:
        raise HTTPException(
            404,
            "This DAG run has no reports: its plan is not in the store: it was not made yet, or is no line's.",
        )
    return plan
