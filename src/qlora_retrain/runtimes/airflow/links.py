"""Links from a task to its pages: the report of its step, and the page of its run.

The pages are served by Airflow's own API server, below `/qlora-retrain/runs/`. A link has the DAG, the run and the task
in it and no address of the store, so whoever follows it needs Airflow's permission and no credential of the store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from airflow.sdk import BaseOperatorLink

from qlora_retrain.core import graph

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey


class ReportLink(BaseOperatorLink):  # type: ignore[misc]
    """To the report that the task's step wrote in this run."""

    name = "Report"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the link; Airflow asks for it when the task ends, however it ends."""
        return page_path(ti_key, ti_key.task_id)


class RunLink(BaseOperatorLink):  # type: ignore[misc]
    """To the page of the run: how far each step is, and how it ended."""

    name = "Run page"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        """Return the link; Airflow asks for it when the task ends, however it ends."""
        return page_path(ti_key, graph.PLAN_TASK)


def links_of(step: str) -> tuple[BaseOperatorLink, ...]:
    """Return the links of a step's task; of a step that writes no report, only the one to the run's page."""
    return (ReportLink(), RunLink()) if graph.step(step).report else (RunLink(),)


def page_path(ti_key: TaskInstanceKey, task_id: str) -> str:
    """Return the path of the page of a task in its run."""
    # Whoever triggers a run may name it, also with slashes.
    parts = (quote(part, safe="") for part in (ti_key.dag_id, ti_key.run_id, task_id))
    return f"{_pages()}/runs/{'/'.join(parts)}"


def version_path(line: str, version: str, rival: str | None) -> str:
    """Return the path of the page of a version; with another version, of the page that compares the two."""
    if rival is None:
        return f"{_pages()}/models/{quote(line, safe='')}/{quote(version, safe='')}"
    return f"{_pages()}/models/{quote(line, safe='')}/diff?{urlencode({'a': rival, 'b': version})}"


def _pages() -> str:
    """Return the path of the plugin's pages on Airflow's API server."""
    from airflow.sdk.configuration import conf

    # Airflow may be served below a path of its own.
    return f"{urlsplit(conf.get('api', 'base_url', fallback='/')).path.rstrip('/')}/qlora-retrain"
