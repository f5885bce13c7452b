"""An Airflow task that runs a step as a subprocess of the worker, in the same virtual environment.

The step's output goes to the task's log. When Airflow kills the task, `supervisor.py` asks the step to stop and allows
it a minute to save its work. No command goes through a shell.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowTaskTimeout

from qlora_retrain.core import errors, graph, supervisor
from qlora_retrain.core.endings import Ending
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes import credentials, local
from qlora_retrain.runtimes.airflow.operators import StepOperator, StepOutput, fail_task

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

GRACE_SECONDS = 60.0
_MAX_LINE_CHARACTERS = 64 * 1024


class LocalStepOperator(StepOperator):
    """One step of the graph as a subprocess; its arguments are those of `StepOperator`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process: subprocess.Popen[str] | None = None

    def run_step(self, plan: Plan, context: Context) -> None:
        """Run the step under the supervisor, and copy its output to the task's log."""
        output, exit_code = self.run_process([*local.step_command(self.step, plan.uri), *self.step_arguments])
        if exit_code != errors.Exit.DONE:
            fail_task(context, Ending.from_process(self.step, exit_code, output.ending, output.last_lines))

    def run_process(self, command: list[str]) -> tuple[StepOutput, int]:
        """Run a command with the step's credentials; return its output and its exit code."""
        with subprocess.Popen(
            supervisor.supervised_command(command, grace_seconds=GRACE_SECONDS),
            cwd=code_identity.project_root(),
            env=self.process_environment(),
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
                output = self.copy_output(lines)
            except AirflowTaskTimeout:
                # Read on to the end, because a step whose output nobody reads cannot save its work.
                self._process.terminate()
                self.copy_output(lines)
                raise

        return output, self._process.returncode

    def process_environment(self) -> dict[str, str]:
        """Return what the process sees: nothing of Airflow's own, and of credentials the step's alone."""
        return credentials.step_environment(environment_without_airflow(), graph.step(self.step), self.line)

    def on_kill(self) -> None:
        """Request the step to stop; the supervisor allows it `GRACE_SECONDS`, longer than Airflow allows this task."""
        if self._process is not None:
            self._process.terminate()


def environment_without_airflow() -> dict[str, str]:
    """Copy this process's environment without Airflow's own settings, which hold its database and signing keys."""
    # A step runs code and loads files that Airflow does not control; it must not see Airflow's keys.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "_AIRFLOW"))}
    return {**inherited, "PYTHONUNBUFFERED": "1"}
