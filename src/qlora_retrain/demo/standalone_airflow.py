"""A real Airflow on loopback, started and stopped from Python: API server, scheduler, DAG processor, SQLite.

Reads the project's `dags/`; keeps its database and logs in AIRFLOW_HOME (default `.state/airflow`). It listens on
127.0.0.1 only and answers to no other name. Its only user is an administrator, whose password is new at every start and
lies in a file that only its owner may read: for a laptop, a demo and tests. A production Airflow needs nothing of this
module. Its processes end with it: on `stop`, on an exception, on Ctrl-C, and when this process is killed.

Use: `with StandaloneAirflow() as airflow: airflow.api.trigger("support-intents")`
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO

from qlora_retrain.core import supervisor
from qlora_retrain.core.errors import UsageError
from qlora_retrain.demo.airflow_api import USER, AirflowApi, AirflowApiError
from qlora_retrain.demo.host import MARKER_VARIABLE as MARKER_VARIABLE
from qlora_retrain.demo.host import acquire_lock, kill_marked_processes, reserve_port, tail
from qlora_retrain.pipeline import code_identity

# Four processes import for minutes where other programs use the processor; one of them that ends is said at once.
START_SECONDS = 600.0
AIRFLOW_COMMANDS = {
    "api-server": ("api-server",),
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
    "triggerer": ("triggerer", "--skip-serve-logs"),
}
# The API server stops last: while the scheduler shuts down, its tasks still report their states to it.
STOP_ORDER = (("scheduler", "dag-processor", "triggerer"), ("api-server",))
STOP_SECONDS = {"scheduler": 30.0, "dag-processor": 5.0, "triggerer": 5.0, "api-server": 1.0}


class StandaloneAirflow:
    """A context manager around a running Airflow.

    Attributes:
        url: Where the UI and the REST API are, on loopback.
        api: A client of it.
        home: AIRFLOW_HOME.
        password: The password of the user `airflow_api.USER`.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        dags: Path | None = None,
        port: int = 0,
        parallelism: int = 2,
        triggerer: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare, but start nothing.

        Args:
            home: AIRFLOW_HOME; only one Airflow at a time can use it.
            dags: The folder of DAG files.
            port: 0 takes a free one.
            parallelism: The number of tasks that run at once.
            triggerer: Start a triggerer, which watches data and follows deferred tasks; it takes 170 MB.
            environment: More variables for Airflow and its tasks.
        """
        self._project = project = code_identity.project_root()
        self.home = (home or project / ".state" / "airflow").resolve()
        self._passwords = self.home / "passwords.json"
        self._dags = (dags or project / "dags").resolve()
        self._port = port
        self._parallelism = parallelism
        self._has_triggerer = triggerer
        self._extra_environment = dict(environment or {})
        self._marker = secrets.token_hex(16)
        self.password = secrets.token_urlsafe(24)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: IO[str] | None = None
        self._reservation: socket.socket | None = None

    def __enter__(self) -> StandaloneAirflow:
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
        """Start every process and wait until Airflow answers.

        Raises:
            UsageError: If AIRFLOW_HOME is in use or a process ends at once; with the last lines of its log.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)  # the logs and the database too
        # Before anything is started, because one SQLite database cannot serve two schedulers.
        self._lock = acquire_lock(self.home)
        if not self._port:
            self._port, self._reservation = reserve_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.api = AirflowApi(self.url, self.password)
        self._environment = self._build_environment()
        self._passwords.unlink(missing_ok=True)
        self._passwords.touch(mode=0o600, exist_ok=False)
        self._passwords.write_text(json.dumps({USER: self.password}), encoding="utf-8")
        # `wait_for_dag` compares it with the time at which a DAG's file was parsed.
        self.started_at = datetime.now(UTC)

        # The API server imports for ten seconds before it opens the database, so migrate it in that time.
        self._start_process("api-server")
        self._migrate()
        self._start_process("scheduler")
        self._start_process("dag-processor")
        if self._has_triggerer:
            self._start_process("triggerer")
        self._wait_until("Airflow answers", self._is_healthy)

    def wait_for_dag(self, dag_id: str) -> None:
        """Wait until this Airflow, and not an earlier one with the same database, has parsed the DAG's file.

        Raises:
            UsageError: If no file defines the DAG; with the errors of the files.
        """
        self._wait_until(f"a DAG {dag_id} in {self._dags}", lambda: self._is_dag_parsed(dag_id))

    def log_file(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> Path:
        """Return the file in which Airflow keeps a task's log."""
        folder = self.home / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}" / f"task_id={task_id}"
        return folder / f"attempt={try_number}.log"

    def stop(self) -> None:
        """Stop every process that was started; another Ctrl-C meanwhile skips the waiting and nothing else."""
        is_graceful = True
        for names in STOP_ORDER:
            processes = {name: self._processes.pop(name) for name in names if name in self._processes}
            for process in processes.values():
                process.terminate()

            for name, process in processes.items():
                try:
                    # Five seconds more than the supervisor allows, which then kills the process itself.
                    process.wait(STOP_SECONDS[name] + 5 if is_graceful else 0.0)
                except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
                    is_graceful = is_graceful and not isinstance(error, KeyboardInterrupt)
                    process.kill()
                    process.wait()

        # A step's supervisor runs in a session of its own, so it may have outlived the scheduler.
        kill_marked_processes(self._marker)
        if self._reservation is not None:
            self._reservation.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start_process(self, name: str) -> None:
        arguments = [sys.executable, "-m", "airflow", *AIRFLOW_COMMANDS[name]]
        with (self.home / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                supervisor.supervised_command(arguments, grace_seconds=STOP_SECONDS[name]),
                cwd=self._project,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _migrate(self) -> None:
        """Create or migrate the database, once for each version of Airflow."""
        # The file's name holds the version; it saves the seconds that a migration with nothing to do takes.
        done_marker = self.home / f"migrated-{version('apache-airflow-core')}"
        if done_marker.exists() and (self.home / "airflow.db").exists():
            return

        command = supervisor.supervised_command([sys.executable, "-m", "airflow", "db", "migrate"], grace_seconds=5)
        log = self.home / "migrate.log"
        with log.open("wb") as stream:
            exit_code = subprocess.call(
                command, env=self._environment, cwd=self._project, stdout=stream, stderr=subprocess.STDOUT
            )
        if exit_code:
            raise UsageError(f"airflow db migrate failed:\n{tail(log)}")
        done_marker.touch()

    def _wait_until(self, description: str, is_ready: Callable[[], bool]) -> None:
        """Poll until `is_ready`; fail at once when a process of Airflow ends, since nothing will be ready then."""
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    log = self.home / f"{name}.log"
                    raise UsageError(
                        f"Airflow's {name} ended with exit code {process.returncode}; {log} ends with:\n{tail(log)}"
                    )
            if time.monotonic() > deadline:
                raise UsageError(f"not ready after {START_SECONDS:g} s: {description}; see the logs in {self.home}")
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        # Until the API server listens there is no connection, and until the database is migrated an error.
        with contextlib.suppress(ConnectionError, AirflowApiError):
            health = self.api.health()
            expected = ["metadatabase", "scheduler", "dag_processor", *["triggerer"][: self._has_triggerer]]
            return all(health[component]["status"] == "healthy" for component in expected)
        return False

    def _is_dag_parsed(self, dag_id: str) -> bool:
        """Return whether the DAG was parsed since this Airflow started; the database may hold an older parse.

        Raises:
            UsageError: If there is no such DAG, but a file that cannot be imported.
        """
        try:
            last_parsed = self.api.dag(dag_id)["last_parsed_time"]
        except AirflowApiError as error:
            if error.status != 404:
                raise
            if import_errors := self.api.import_errors():
                raise UsageError("a DAG file cannot be read:\n" + "\n".join(import_errors)) from error
            return False
        return last_parsed is not None and datetime.fromisoformat(last_parsed) >= self.started_at

    def _build_environment(self) -> dict[str, str]:
        """Return this process's environment with the settings of this Airflow, and of no other."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "_AIRFLOW"))}
        settings = {
            "CORE__DAGS_FOLDER": str(self._dags),
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": str(self._parallelism),
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
            "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self._passwords),
            "CORE__PLUGINS_FOLDER": str(Path(__file__).with_name("airflow_plugins")),
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.home / 'airflow.db'}",
            # The API server starts before the database is migrated.
            "DATABASE__CHECK_MIGRATIONS": "False",
            "API__HOST": "127.0.0.1",
            "API__PORT": str(self._port),
            "API__BASE_URL": self.url,
            # New keys at every start, so that none is on disk.
            "API__SECRET_KEY": secrets.token_urlsafe(32),
            "API_AUTH__JWT_SECRET": secrets.token_urlsafe(64),
            # Half a second between steps costs less time than more frequent scheduler queries would cost training.
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
            "SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        return {
            **inherited,
            **{f"AIRFLOW__{name}": value for name, value in settings.items()},
            "AIRFLOW_HOME": str(self.home),
            MARKER_VARIABLE: self._marker,
            **self._extra_environment,
        }
