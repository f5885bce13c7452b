"""The pages of published models: lines, versions and what differs between two; and the form that moves an alias."""

from __future__ import annotations

from typing import Annotated, Any

from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep
from fastapi import APIRouter, Depends, Form, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from qlora_retrain.pipeline import version_diff, version_summary
from qlora_retrain.runtimes.airflow.dag_run import store_root
from qlora_retrain.runtimes.airflow.ui import access, form_guard, model_pages, moves, version_pages
from qlora_retrain.runtimes.airflow.ui.access import Line, ReadableDags, Version
from qlora_retrain.runtimes.airflow.ui.pages import UrlsDep
from qlora_retrain.runtimes.airflow.ui.run_routes import report_response
from qlora_retrain.storage import open_store, registry, verified_files
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

router = APIRouter(default_response_class=HTMLResponse)
VersionQuery = Annotated[str, Query(pattern=access.VERSION_PATTERN)]


def current_store() -> Store:
    """Return the platform's store."""
    return open_store(store_root())


StoreDep = Annotated[Store, Depends(current_store)]


def move_rights(request: Request, user: GetUserDep, session: SessionDep) -> model_pages.MoveRights:
    """Return what the user may do with the DAG that moves aliases, and the runs of it that the user may see."""
    has_dag = moves.is_available(session)
    return model_pages.MoveRights(
        may_start=has_dag and access.may("POST", request, user, moves.MOVE_DAG),
        may_watch=has_dag and access.may("GET", request, user, moves.MOVE_DAG),
    )


def may_move(request: Request, user: GetUserDep, line: Line) -> str:
    """Return the line, if the user may read it and may start the DAG that moves aliases, from a page of ours."""
    access.check_may_trigger(request, user, moves.MOVE_DAG)
    form_guard.check_origin(request)
    return line


MoveRightsDep = Annotated[model_pages.MoveRights, Depends(move_rights)]


@router.get("/models")
def show_lines(user: GetUserDep, readable: ReadableDags, urls: UrlsDep, store: StoreDep) -> HTMLResponse:
    """Show the lines that the user may read."""
    lines = [line for line in store.children("models") if line in readable]
    return HTMLResponse(model_pages.lines_page(version_summary.read_lines(store, lines), urls))


@router.get("/models/{line}")
def show_line(
    line: Line, user: GetUserDep, urls: UrlsDep, store: StoreDep, session: SessionDep, rights: MoveRightsDep
) -> HTMLResponse:
    """Show the versions of a line."""
    summary = version_summary.read_line(store, line)
    if not summary.num_versions:
        raise HTTPException(404, f"Line {line} has published no version yet.")
    production = summary.aliases.get(registry.PRODUCTION)
    target = moves.rollback_target(production) if production and rights.may_start else None
    runs = moves.recent_runs(session, line) if rights.may_watch else []
    token = form_guard.new_token(user, line) if rights.may_start else ""
    return HTMLResponse(model_pages.line_page(summary, urls, target, runs, token))


@router.get("/models/{line}/diff")
def show_diff(line: Line, urls: UrlsDep, store: StoreDep, a: VersionQuery, b: VersionQuery) -> HTMLResponse:
    """Show what differs between two versions."""
    first, second = (_release(store, line, version) for version in (a, b))
    diff = version_diff.compare(store, first, second)
    return HTMLResponse(version_pages.diff_page(first, second, diff, urls))


@router.post("/models/{line}/move", status_code=303)
def start_move(
    request: Request,
    user: GetUserDep,
    line: Annotated[str, Depends(may_move)],
    form: Annotated[moves.MoveForm, Form()],
    urls: UrlsDep,
    store: StoreDep,
    session: SessionDep,
) -> Response:
    """Start the DAG that moves the alias, and go back to the line."""
    form_guard.check_token(form.token, user, line)
    _release(store, line, form.version)
    state, _ = registry.read_alias(store, line, registry.PRODUCTION)
    current = state.version if state else ""
    if current != form.from_version:
        raise HTTPException(
            409, f"{registry.PRODUCTION} names {current or 'nothing'} now: open the page again, and decide."
        )
    if not moves.is_available(session):
        raise HTTPException(404, f"This Airflow has no DAG {moves.MOVE_DAG}, which moves aliases.")
    moves.start(request, user, session, line, form)
    return RedirectResponse(f"{urls.line(line)}#moves", status_code=303)


@router.get("/models/{line}/{version}")
def show_version(
    line: Line,
    version: Version,
    user: GetUserDep,
    urls: UrlsDep,
    store: StoreDep,
    rights: MoveRightsDep,
    tab: Annotated[str, Query(max_length=40)] = "",
) -> HTMLResponse:
    """Show a version: what was decided, what it was made of, and its reports."""
    summary = version_summary.summarize(store, _release(store, line, version))
    production, _ = registry.read_alias(store, line, registry.PRODUCTION)
    token = form_guard.new_token(user, line) if rights.may_start else ""
    return HTMLResponse(version_pages.version_page(summary, production, urls, tab, token))


@router.get("/models/{line}/{version}/reports/{report}")
def show_version_report(line: Line, version: Version, report: str, store: StoreDep) -> Response:
    """Show a report of a version, checked against its manifest."""
    release = _release(store, line, version)
    # Among the version's own files, so that nothing of the address becomes a path.
    path = version_pages.REPORTS.get(report)
    file = verified_files.find_file(release.files, path) if path else None
    if file is None:
        raise HTTPException(404, "This version has no such report.")
    return report_response(verified_files.read_verified(store, registry.version_folder(line, version), file))


def _release(store: Store, line: str, version: str) -> Release:
    release: Any = version_summary.find_release(store, line, version)
    if release is None:
        raise HTTPException(404, f"Line {line} has no version {version}.")
    assert isinstance(release, Release)
    return release
