"""A small client of Airflow's REST API: start a run, watch it, end it.

Refuses (12) what Airflow refuses, with Airflow's own reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from qlora_retrain.core.errors import UsageError

TIMEOUT_SECONDS = 30.0
# Tries of a request whose repetition changes nothing, and the seconds between them: SQLite, which the demo's Airflow
# uses, refuses a write while another process writes, and the API answers 500.
_MAX_TRIES = 5
_PAUSE_SECONDS = 1.0
_GATEWAY_TIMEOUT = 504
FINAL_STATES = ("success", "failed")
# The demo Airflow's only user.
USER = "admin"
# The server is on loopback, and its password is no business of a proxy's.
_open = build_opener(ProxyHandler({})).open


class AirflowApiError(UsageError):
    """Airflow refused a request: `status` is the HTTP status, the text holds Airflow's reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class TaskState:
    """A task instance as Airflow reports it; `state` is None before it is scheduled."""

    task_id: str
    state: str | None
    try_number: int
    duration_seconds: float


class AirflowApi:
    """The calls of Airflow's REST API that this project needs.

    Args:
        url: The server's base URL.
        password: The user's password; None where the server asks for none.
        user: Who signs in.
    """

    def __init__(self, url: str, password: str | None = None, user: str = USER) -> None:
        self.url = url
        self._user = user
        self._password = password
        self._token: str | None = None

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, done_status: int | None = None
    ) -> Any:
        """Send a request below `/api/v2`, with JSON in both directions; repeat it after a 5xx where that is safe.

        Args:
            method: The HTTP method; GET and PATCH are safe to repeat.
            path: The path below `/api/v2`.
            body: The JSON to send.
            done_status: The status with which a repeated POST says that the first one did its work after all.

        Raises:
            AirflowApiError: For a 4xx or 5xx answer, with its reason.
            ConnectionError: If no server answers.
        """
        tries = _MAX_TRIES if method in ("GET", "PATCH") or done_status else 1
        for i in range(tries):
            try:
                return self._request_once(method, path, body)
            except AirflowApiError as error:
                if i and error.status == done_status:
                    return None
                if error.status < 500 or i == tries - 1:
                    raise
            time.sleep(_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def _request_once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Send a request below `/api/v2`; sign in before the first one, and again once the token is a day old."""
        if self._password is None:
            return self._send(method, f"api/v2/{path}", body)
        if self._token is not None:
            try:
                return self._send(method, f"api/v2/{path}", body)
            except AirflowApiError as error:
                if error.status != 401:
                    raise
        self._token = None
        self._token = self._send("POST", "auth/token", {"username": self._user, "password": self._password})[
            "access_token"
        ]
        return self._send(method, f"api/v2/{path}", body)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = Request(f"{self.url}/{path}", data=data, headers=headers, method=method)  # noqa: S310

        # `open` raises for an error without reading the body, which has Airflow's reason.
        try:
            with _open(request, timeout=TIMEOUT_SECONDS) as response:
                return json.loads(response.read() or b"null")
        except HTTPError as error:
            with error:
                raise AirflowApiError(error.code, f"Airflow refused {method} {path}: {_error_detail(error)}") from error
        except URLError as error:
            raise ConnectionError(f"{self.url}: {error.reason}") from error
        # Of a server that is there, but busy: asked for again where that is safe, as after a 5xx.
        except TimeoutError as error:
            message = f"Airflow did not answer {method} {path} within {TIMEOUT_SECONDS:g} seconds"
            raise AirflowApiError(_GATEWAY_TIMEOUT, message) from error

    def health(self) -> dict[str, Any]:
        """Return the state of each component of Airflow."""
        components: dict[str, Any] = self.request("GET", "monitor/health")
        return components

    def dag(self, dag_id: str) -> dict[str, Any]:
        """Return what Airflow knows about a DAG."""
        dag: dict[str, Any] = self.request("GET", f"dags/{quote(dag_id)}")
        return dag

    def import_errors(self) -> list[str]:
        """List the stack traces of the DAG files that could not be imported."""
        return [item["stack_trace"] for item in self.request("GET", "importErrors")["import_errors"]]

    def unpause(self, dag_id: str) -> None:
        """Let the DAG's runs start; a new DAG is paused."""
        self.request("PATCH", f"dags/{quote(dag_id)}?update_mask=is_paused", {"is_paused": False})

    def trigger(self, dag_id: str, params: Mapping[str, Any] | None = None) -> str:
        """Start a run and return its id.

        Raises:
            AirflowApiError: With 4xx and the reason, where a parameter does not match its schema.
        """
        # The logical date must be unique among the runs of a DAG; a run without one never conflicts.
        # With an id of ours, so that a request can be repeated without starting a second run.
        run_id = f"manual__{datetime.now(UTC).isoformat()}"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(params or {})}
        self.request("POST", f"dags/{quote(dag_id)}/dagRuns", body, done_status=409)
        return run_id

    def dag_run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """Return a DAG run: its `state`, `run_after`, ..."""
        dag_run: dict[str, Any] = self.request("GET", _dag_run_path(dag_id, run_id))
        return dag_run

    def active_run_ids(self, dag_id: str) -> list[str]:
        """List the ids of the runs that are queued or running."""
        dag_runs = self.request("GET", f"dags/{quote(dag_id)}/dagRuns?state=queued&state=running")["dag_runs"]
        return [item["dag_run_id"] for item in dag_runs]

    def mark_failed(self, dag_id: str, run_id: str) -> None:
        """Mark a run as failed, which stops its tasks."""
        self.request("PATCH", f"{_dag_run_path(dag_id, run_id)}?update_mask=state", {"state": "failed"})

    def task_states(self, dag_id: str, run_id: str) -> list[TaskState]:
        """Return every task of a run."""
        items = self.request("GET", f"{_dag_run_path(dag_id, run_id)}/taskInstances")["task_instances"]
        return [TaskState(i["task_id"], i["state"], i["try_number"], _duration_seconds(i)) for i in items]

    def log_lines(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1) -> list[str]:
        """Return the lines of a task's log."""
        return [item.get("event", "") for item in self._log_items(dag_id, run_id, task_id, try_number)]

    def failure_message(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1) -> str:
        """Return the message of a task's last exception, or its last line."""
        items = self._log_items(dag_id, run_id, task_id, try_number)
        # An exception is a structured item of the log; a task that was killed has none.
        messages = [detail["exc_value"] for item in items for detail in item.get("error_detail") or ()]
        return str(messages[-1] if messages else items[-1].get("event", "") if items else "there is no log")

    def _log_items(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> list[dict[str, Any]]:
        path = f"{_dag_run_path(dag_id, run_id)}/taskInstances/{quote(task_id)}/logs/{try_number}?full_content=true"
        content = self.request("GET", path)["content"]

        # Structured lines come as objects, all other lines as strings.
        return [item if isinstance(item, dict) else {"event": str(item)} for item in content]

    def wait_until_finished(self, dag_id: str, run_id: str, *, timeout_seconds: float) -> str:
        """Return the final state of a run.

        Raises:
            TimeoutError: If it has none after `timeout_seconds`.
        """
        # Polled, because the REST API has no call that waits.
        deadline = time.monotonic() + timeout_seconds
        while (state := self.dag_run(dag_id, run_id)["state"]) not in FINAL_STATES:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{dag_id} {run_id}: still {state} after {timeout_seconds:g} s")
            time.sleep(0.2)
        return str(state)


def _dag_run_path(dag_id: str, run_id: str) -> str:
    # A run's id contains a time with `:` and `+`, so nothing in it is safe in a URL.
    return f"dags/{quote(dag_id)}/dagRuns/{quote(run_id, safe='')}"


def _duration_seconds(task_instance: Mapping[str, Any]) -> float:
    """Return how long a task ran, or has run so far."""
    if task_instance["duration"] is not None:
        return float(task_instance["duration"])
    if task_instance["start_date"] is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(task_instance["start_date"])).total_seconds()


def _error_detail(error: HTTPError) -> str:
    """Return the reason in an error's body, or the HTTP status where it has none."""
    text = error.read().decode("utf-8", "replace")
    try:
        detail = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
    return detail if isinstance(detail, str) else json.dumps(detail)
