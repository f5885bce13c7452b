"""An Airflow task that runs a step as a subprocess of the worker, in the same virtual environment.

The step's output goes to the task's log. When Airflow kills the task, `supervisor.py` asks the step to stop and allows
it a minute to save its work. No command goes through a shell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_retrain.core import errors, graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.runtimes import credentials, local
from qlora_retrain.runtimes.airflow.operators import StepOperator, StepOutput, fail_task
from qlora_retrain.runtimes.airflow.supervised_process import SupervisedProcess, environment_without_airflow

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan


class LocalStepOperator(StepOperator):
    """One step of the graph as a subprocess; its arguments are those of `StepOperator`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process = SupervisedProcess()

    def run_step(self, plan: Plan, context: Context) -> None:
        """Run the step under the supervisor, and copy its output to the task's log."""
        output, exit_code = self.run_process([*local.step_command(self.step, plan.uri), *self.step_arguments])
        if exit_code != errors.Exit.DONE:
            fail_task(context, Ending.from_process(self.step, exit_code, output.ending, output.last_lines))

    def run_process(self, command: list[str]) -> tuple[StepOutput, int]:
        """Run a command with the step's credentials; return its output and its exit code."""
        return self._process.run(command, self.process_environment(), self.copy_output)

    def process_environment(self) -> dict[str, str]:
        """Return what the process sees: nothing of Airflow's own, and of credentials the step's alone."""
        return credentials.step_environment(environment_without_airflow(), graph.step(self.step), self.line)

    def on_kill(self) -> None:
        """Request the step to stop; the supervisor allows it a minute, longer than Airflow allows this task."""
        self._process.terminate()
