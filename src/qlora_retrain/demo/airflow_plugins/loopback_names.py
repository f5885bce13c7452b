"""An Airflow plugin: refuse (400) every request that does not name this machine's loopback in its Host header.

A page on the web can let its own name point to 127.0.0.1 and then talk to this port as its own (DNS rebinding). Its
requests still carry that name. Airflow's server loads this file, because `StandaloneAirflow` names its folder.
"""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

HOSTS = ["127.0.0.1", "localhost"]


class OneLoopbackName(TrustedHostMiddleware):
    """Starlette's check, which looks at the first Host header alone, where there is one at most."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what names this machine's loopback, once."""
        if sum(name == b"host" for name, _ in scope.get("headers", ())) > 1:
            await PlainTextResponse("Invalid host header", status_code=400)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class LoopbackNames(AirflowPlugin):  # type: ignore[misc]
    """Put the check in front of everything that the server has: pages, REST API and the tasks' API."""

    name = "loopback_names"
    fastapi_root_middlewares = [  # noqa: RUF012 - the form that Airflow asks for
        {
            "name": name,
            "middleware": OneLoopbackName,
            "args": [],
            "kwargs": {"allowed_hosts": HOSTS, "www_redirect": False},
        }
    ]
