"""Run a program of this project as a subprocess of the worker, under the supervisor, with its output in the task's log.

The supervisor ends the program with this process. It asks the program to stop, and allows it a minute to save its work.
No command goes through a shell.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping

from airflow.sdk.exceptions import AirflowTaskTimeout

from qlora_retrain.core import supervisor
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes.airflow.step_log import StepOutput

GRACE_SECONDS = 60.0
_MAX_LINE_CHARACTERS = 64 * 1024


class SupervisedProcess:
    """A program that runs to its end, or until `terminate`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        command: list[str],
        environment: Mapping[str, str],
        copy_output: Callable[[Iterable[str]], StepOutput],
    ) -> tuple[StepOutput, int]:
        """Run a command; return its output and its exit code.

        Args:
            command: The command line.
            environment: Its environment.
            copy_output: Copies its output to the task's log.
        """
        with subprocess.Popen(
            supervisor.supervised_command(command, grace_seconds=GRACE_SECONDS),
            cwd=code_identity.project_root(),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as self._process:
            stream = self._process.stdout
            assert stream is not None

            # `readline` with a limit: output without a line break must not fill the worker's memory.
            lines = iter(lambda: stream.readline(_MAX_LINE_CHARACTERS), "")
            try:
                output = copy_output(lines)
            except AirflowTaskTimeout:
                # Read on to the end, because a program whose output nobody reads cannot save its work.
                self._process.terminate()
                copy_output(lines)
                raise

        return output, self._process.returncode

    @property
    def returncode(self) -> int | None:
        """The exit code; None while the program runs, or where none was started."""
        return self._process.returncode if self._process is not None else None

    def terminate(self) -> None:
        """Request the program to stop; it has `GRACE_SECONDS`, longer than Airflow allows a task."""
        if self._process is not None:
            self._process.terminate()


def environment_without_airflow() -> dict[str, str]:
    """Copy this process's environment without Airflow's own settings, which hold its database and signing keys."""
    # A step runs code and loads files that Airflow does not control; it must not see Airflow's keys.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "_AIRFLOW"))}
    return {**inherited, "PYTHONUNBUFFERED": "1"}
