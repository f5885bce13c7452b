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
from urllib.request import Request, urlopen

from qlora_retrain.core.errors import UsageError

TIMEOUT_SECONDS = 30.0
RUN_ENDED = ("success", "failed")


class ApiRefused(UsageError):
    """Airflow said no: `status` is HTTP's, the text holds its reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class TaskState:
    """A task instance as Airflow has it; `state` is None before it is scheduled."""

    name: str
    state: str | None
    tries: int
    seconds: float


class AirflowApi:
    """The calls that this project needs, at a base URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request below `/api/v2`, JSON both ways.

        Raises:
            ApiRefused: For a 4xx or 5xx answer, with its reason.
            ConnectionError: If nobody answers.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        request = Request(f"{self.url}/api/v2/{path}", data=data, headers=headers, method=method)  # noqa: S310
        try:
            with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - the URL is ours, on loopback
                return json.loads(answer.read() or b"null")
        except HTTPError as error:
            with error:
                raise ApiRefused(error.code, f"Airflow refused {method} {path}: {_reason(error)}") from error
        except URLError as error:
            raise ConnectionError(f"{self.url}: {error.reason}") from error

    def health(self) -> dict[str, Any]:
        """The state of each part of Airflow."""
        found: dict[str, Any] = self.call("GET", "monitor/health")
        return found

    def dag(self, dag_id: str) -> dict[str, Any]:
        """What Airflow knows about a DAG."""
        found: dict[str, Any] = self.call("GET", f"dags/{quote(dag_id)}")
        return found

    def import_errors(self) -> list[str]:
        """What went wrong while DAG files were read."""
        return [item["stack_trace"] for item in self.call("GET", "importErrors")["import_errors"]]

    def unpause(self, dag_id: str) -> None:
        """Let the DAG's runs start."""
        self.call("PATCH", f"dags/{quote(dag_id)}?update_mask=is_paused", {"is_paused": False})

    def trigger(self, dag_id: str, params: Mapping[str, Any] | None = None) -> str:
        """Start a run and return its id.

        Raises:
            ApiRefused: With 4xx and the reason, where a parameter breaks its schema.
        """
        body = {"logical_date": None, "conf": dict(params or {})}
        return str(self.call("POST", f"dags/{quote(dag_id)}/dagRuns", body)["dag_run_id"])

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """A DAG run: its `state`, `run_after`, ..."""
        found: dict[str, Any] = self.call("GET", _run(dag_id, run_id))
        return found

    def active_runs(self, dag_id: str) -> list[str]:
        """The ids of the runs that are queued or running."""
        runs = self.call("GET", f"dags/{quote(dag_id)}/dagRuns?state=queued&state=running")["dag_runs"]
        return [item["dag_run_id"] for item in runs]

    def end(self, dag_id: str, run_id: str) -> None:
        """Mark a run failed; its tasks are stopped."""
        self.call("PATCH", f"{_run(dag_id, run_id)}?update_mask=state", {"state": "failed"})

    def tasks(self, dag_id: str, run_id: str) -> list[TaskState]:
        """Every task of a run."""
        found = self.call("GET", f"{_run(dag_id, run_id)}/taskInstances")["task_instances"]
        return [TaskState(t["task_id"], t["state"], t["try_number"], _seconds(t)) for t in found]

    def log(self, dag_id: str, run_id: str, task: str, try_number: int = 1) -> list[str]:
        """The lines of a task's log."""
        return [item.get("event", "") for item in self._log(dag_id, run_id, task, try_number)]

    def why(self, dag_id: str, run_id: str, task: str, try_number: int = 1) -> str:
        """What a task failed with: the message of its last exception, or its last line."""
        items = self._log(dag_id, run_id, task, try_number)
        errors = [detail["exc_value"] for item in items for detail in item.get("error_detail") or ()]
        return str(errors[-1] if errors else items[-1].get("event", "") if items else "it left no log")

    def _log(self, dag_id: str, run_id: str, task: str, try_number: int) -> list[dict[str, Any]]:
        path = f"{_run(dag_id, run_id)}/taskInstances/{quote(task)}/logs/{try_number}?full_content=true"
        content = self.call("GET", path)["content"]
        return [item if isinstance(item, dict) else {"event": str(item)} for item in content]

    def wait(self, dag_id: str, run_id: str, *, seconds: float) -> str:
        """The final state of a run.

        Raises:
            TimeoutError: If it has none after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while (state := self.run(dag_id, run_id)["state"]) not in RUN_ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{dag_id} {run_id}: still {state} after {seconds:g} s")
            time.sleep(0.2)
        return str(state)


def _run(dag_id: str, run_id: str) -> str:
    return f"dags/{quote(dag_id)}/dagRuns/{quote(run_id, safe='')}"


def _seconds(task: Mapping[str, Any]) -> float:
    """How long a task ran, or runs by now."""
    if task["duration"] is not None:
        return float(task["duration"])
    if task["start_date"] is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(task["start_date"])).total_seconds()


def _reason(error: HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        detail = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
    return detail if isinstance(detail, str) else json.dumps(detail)
