"""A real Airflow on loopback, started and stopped from Python: API server, scheduler, DAG processor, SQLite.

Reads the project's `dags/`; keeps its database and logs in AIRFLOW_HOME (default `.state/airflow`). Everyone who can
reach the port is an administrator, so it listens on 127.0.0.1 only: for a laptop, a demo and tests. A production
Airflow needs nothing of this module. What it starts ends with it: on `stop`, on an exception, on Ctrl-C, and when this
process is killed.

Use: `with EmbeddedAirflow() as airflow: airflow.api.trigger("support-intents")`
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO

from qlora_retrain.core import supervisor
from qlora_retrain.core.errors import UsageError
from qlora_retrain.demo.airflow_api import AirflowApi, ApiRefused
from qlora_retrain.pipeline import code_identity

MARK = "QLORA_RETRAIN_EMBEDDED"
START_SECONDS = 180.0
PARTS = {
    "api-server": ("api-server",),
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
}
# While the scheduler winds up, its tasks still report to the API server, which then has nothing left to save.
STOP_ORDER = (("scheduler", "dag-processor"), ("api-server",))
STOP_SECONDS = {"scheduler": 30.0, "dag-processor": 5.0, "api-server": 1.0}


class EmbeddedAirflow:
    """Context manager around a running Airflow.

    Attributes:
        url: Where the UI and the REST API are, on loopback.
        api: A client of it.
        home: AIRFLOW_HOME.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        dags: Path | None = None,
        port: int = 0,
        parallelism: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare, start nothing.

        Args:
            home: AIRFLOW_HOME; one Airflow at a time uses it.
            dags: The folder of DAG files.
            port: 0 takes a free one.
            parallelism: Tasks that run at once.
            environment: More variables for Airflow and its tasks.
        """
        project = code_identity.project_root()
        self.home = (home or project / ".state" / "airflow").resolve()
        self._dags = (dags or project / "dags").resolve()
        self._project = project
        self._port = port
        self._parallelism = parallelism
        self._extra = dict(environment or {})
        self._mark = secrets.token_hex(16)
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> EmbeddedAirflow:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and return when it answers.

        Raises:
            UsageError: If AIRFLOW_HOME is in use or a part ends at once; with the last lines of its log.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.home)
        self._port = self._port or _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.api = AirflowApi(self.url)
        self._environment = self._settings()
        self.started_at = datetime.now(UTC)
        # The API server imports for ten seconds before it looks at the database: make that meanwhile.
        self._start("api-server")
        self._migrate()
        self._start("scheduler")
        self._start("dag-processor")
        self._until("Airflow answers", self._healthy)

    def wait_for_dag(self, dag_id: str) -> None:
        """Return when the DAG was read from its file by this Airflow, not an earlier one.

        Raises:
            UsageError: If no file makes it; with the errors of reading them.
        """
        self._until(f"a DAG {dag_id} in {self._dags}", lambda: self._read(dag_id))

    def log_file(self, dag_id: str, run_id: str, task: str, try_number: int) -> Path:
        """Where Airflow keeps a task's log."""
        folder = self.home / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}" / f"task_id={task}"
        return folder / f"attempt={try_number}.log"

    def stop(self) -> None:
        """End everything that was started; a second Ctrl-C meanwhile hurries it and changes nothing else."""
        grace = True
        for names in STOP_ORDER:
            processes = {name: self._parts.pop(name) for name in names if name in self._parts}
            for process in processes.values():
                process.terminate()
            for name, process in processes.items():
                try:
                    process.wait(STOP_SECONDS[name] + 5 if grace else 0.0)
                except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
                    grace = grace and not isinstance(error, KeyboardInterrupt)
                    process.kill()
                    process.wait()
        _kill_marked(self._mark)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start(self, name: str) -> None:
        arguments = [sys.executable, "-m", "airflow", *PARTS[name]]
        with (self.home / f"{name}.log").open("wb") as log:
            self._parts[name] = subprocess.Popen(
                supervisor.command(arguments, grace_seconds=STOP_SECONDS[name]),
                cwd=self._project,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _migrate(self) -> None:
        """Make the database, once a version of Airflow."""
        done = self.home / f"migrated-{version('apache-airflow-core')}"
        if done.exists() and (self.home / "airflow.db").exists():
            return
        command = supervisor.command([sys.executable, "-m", "airflow", "db", "migrate"], grace_seconds=5)
        log = self.home / "migrate.log"
        with log.open("wb") as stream:
            status = subprocess.call(
                command, env=self._environment, cwd=self._project, stdout=stream, stderr=subprocess.STDOUT
            )
        if status:
            raise UsageError(f"airflow db migrate failed:\n{_tail(log)}")
        done.touch()

    def _until(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            for name, process in self._parts.items():
                if process.poll() is not None:
                    log = self.home / f"{name}.log"
                    raise UsageError(f"Airflow's {name} ended ({process.returncode}); {log}:\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise UsageError(f"waited {START_SECONDS:g} s for: {what}; see the logs in {self.home}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        with contextlib.suppress(ConnectionError, ApiRefused):
            health = self.api.health()
            return all(health[p]["status"] == "healthy" for p in ("metadatabase", "scheduler", "dag_processor"))
        return False

    def _read(self, dag_id: str) -> bool:
        try:
            parsed = self.api.dag(dag_id)["last_parsed_time"]
        except ApiRefused as error:
            if error.status != 404:
                raise
            if faults := self.api.import_errors():
                raise UsageError("a DAG file cannot be read:\n" + "\n".join(faults)) from error
            return False
        return parsed is not None and datetime.fromisoformat(parsed) >= self.started_at

    def _settings(self) -> dict[str, str]:
        """The environment: ours whole, with no setting of another Airflow in it."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "_AIRFLOW"))}
        settings = {
            "CORE__DAGS_FOLDER": str(self._dags),
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": str(self._parallelism),
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.home / 'airflow.db'}",
            "DATABASE__CHECK_MIGRATIONS": "False",
            "API__HOST": "127.0.0.1",
            "API__PORT": str(self._port),
            "API__BASE_URL": self.url,
            "API__SECRET_KEY": secrets.token_urlsafe(32),
            "API_AUTH__JWT_SECRET": secrets.token_urlsafe(64),
            # Half a second between steps costs less than the scheduler's queries would cost the training.
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
            "SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        return {
            **kept,
            **{f"AIRFLOW__{name}": value for name, value in settings.items()},
            "AIRFLOW_HOME": str(self.home),
            MARK: self._mark,
            **self._extra,
        }


def _locked(home: Path) -> IO[str]:
    lock = (home / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UsageError(
            f"{home}: an embedded Airflow is running there already; stop it, or give another home"
        ) from error
    return lock


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 15) -> str:
    with log.open(errors="replace") as stream:
        return "".join(deque(stream, lines)).strip()


def _kill_marked(mark: str) -> None:
    """Kill what still carries our mark in its environment: a step that did not end with its task."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
