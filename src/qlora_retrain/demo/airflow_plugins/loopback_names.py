"""An Airflow plugin: refuse (400) every request that does not name this machine's loopback in its Host header.

A page on the web can let its own name point to 127.0.0.1 and then talk to this port as its own (DNS rebinding). Its
requests still carry that name. Airflow's server loads this file, because `StandaloneAirflow` names its folder.
"""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin
from starlette.middleware.trustedhost import TrustedHostMiddleware

HOSTS = ["127.0.0.1", "localhost"]


class LoopbackNames(AirflowPlugin):  # type: ignore[misc]
    """Put Starlette's check in front of everything that the server has: pages, REST API and the tasks' API."""

    name = "loopback_names"
    fastapi_root_middlewares = [  # noqa: RUF012 - the form that Airflow asks for
        {
            "name": name,
            "middleware": TrustedHostMiddleware,
            "args": [],
            "kwargs": {"allowed_hosts": HOSTS, "www_redirect": False},
        }
    ]
