"""The Airflow plugin: a tab "Reports" on every DAG run, and a page "Models" in the navigation.

Every process of Airflow loads its plugins, the DAG processor and each task too. So this module imports nothing that
they do not have, and the pages are built by the API server at their first request.
Registered as `qlora_retrain.runtimes.airflow.ui.plugin:ModelPages` in the entry point group `airflow.plugins`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from airflow.plugins_manager import AirflowPlugin

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

URL_PREFIX = "/qlora-retrain"


class LazyPages:
    """An ASGI application that imports and builds the pages when the first of them is asked for."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._app is None:
            from starlette.concurrency import run_in_threadpool

            # A second of imports, in which the server must go on answering the tasks that report to it.
            self._app = await run_in_threadpool(self._build)
        await self._app(scope, receive, send)

    def _build(self) -> ASGIApp:
        with self._lock:
            if self._app is None:
                from qlora_retrain.runtimes.airflow.ui.app import create_pages

                return create_pages()
            return self._app


class ModelPages(AirflowPlugin):  # type: ignore[misc]
    """What the plugin adds to Airflow; the addresses are relative, since Airflow may stand below a path."""

    name = "qlora_retrain"
    fastapi_apps: list[dict[str, Any]] = [  # noqa: RUF012 - the form that Airflow asks for
        {"name": "qlora-retrain", "app": LazyPages(), "url_prefix": URL_PREFIX}
    ]
    external_views: list[dict[str, Any]] = [  # noqa: RUF012
        {
            "name": "Reports",
            "href": f"{URL_PREFIX[1:]}/runs/{{DAG_ID}}/{{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "qlora-retrain-reports",
        },
        {
            "name": "Models",
            "href": f"{URL_PREFIX[1:]}/models",
            "destination": "nav",
            "url_route": "qlora-retrain-models",
            "nav_top_level": True,
        },
    ]
