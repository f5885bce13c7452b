"""Who may see and do what: Airflow's own users and permissions, on every route.

A line is the DAG of its name. Its pages need what Airflow asks for to read that DAG, its runs need what Airflow asks
for to read runs. Without a session the answer is 401, without the permission 403, before anything is looked up.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.models.dagrun import DagRun
from fastapi import Depends, HTTPException, Path, Request
from sqlalchemy import select

_LINE = re.compile(r"[a-z][a-z0-9-]{0,61}[a-z0-9]")
VERSION_PATTERN = r"^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}$"
# Airflow lets a deployment choose what run ids look like; a database refuses some characters with an error of its own.
_RUN_ID = re.compile(r"[!-~]{1,250}")


def readable_line(line: Annotated[str, Path()], request: Request, user: GetUserDep) -> str:
    """Return a line that the user may read.

    Raises:
        HTTPException: 401 without a user, 404 for what is no line's name, 403 without the permission.
    """
    if not _LINE.fullmatch(line):
        raise HTTPException(404, "No line has this name: a line is called as its DAG.")
    requires_access_dag("GET", None, line)(request, user)
    return line


def readable_run(
    dag_id: Annotated[str, Path()],
    run_id: Annotated[str, Path()],
    request: Request,
    user: GetUserDep,
    session: SessionDep,
) -> Any:
    """Return a DAG run that the user may read, as Airflow's database has it.

    Raises:
        HTTPException: 401 without a user, 404 where there is none, 403 without the permission.
    """
    if not _LINE.fullmatch(dag_id):
        raise HTTPException(404, f"No DAG run of a line: a line's DAG has its name, and this one is called {dag_id}.")
    requires_access_dag("GET", DagAccessEntity.RUN, dag_id)(request, user)
    run = None
    if _RUN_ID.fullmatch(run_id):
        run = session.scalar(select(DagRun).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id))
    if run is None:
        raise HTTPException(404, f"DAG {dag_id} has no run of this id.")
    return run


def readable_dags(user: GetUserDep) -> set[str]:
    """Return the ids of the DAGs that the user may read."""
    dag_ids: set[str] = get_auth_manager().get_authorized_dag_ids(user=user, method="GET")
    return dag_ids


def check_may_trigger(request: Request, user: Any, dag_id: str) -> None:
    """Refuse a user who may not start runs of a DAG.

    Raises:
        HTTPException: 403.
    """
    requires_access_dag("POST", DagAccessEntity.RUN, dag_id)(request, user)


def may(method: str, request: Request, user: Any, dag_id: str) -> bool:
    """Return whether a user may read (GET) or start (POST) runs of a DAG."""
    try:
        requires_access_dag(method, DagAccessEntity.RUN, dag_id)(request, user)
    except HTTPException:
        return False
    return True


Line = Annotated[str, Depends(readable_line)]
Version = Annotated[str, Path(pattern=VERSION_PATTERN)]
Run = Annotated[Any, Depends(readable_run)]
ReadableDags = Annotated[set[str], Depends(readable_dags)]
