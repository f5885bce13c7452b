"""Run a command of `qlora-retrain` where the step `publish` of a line runs, with its account, image and keys.

No other account gets a right by it, and none is needed: the command is another argument of the same container. The
task waits on its worker, as a move takes seconds; on Kubernetes until the pod has started and ended.
"""

from __future__ import annotations

import dataclasses
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from qlora_retrain.core import graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.runtimes.airflow.local import LocalStepOperator
from qlora_retrain.runtimes.airflow.step_log import BEFORE_THAT
from qlora_retrain.runtimes.airflow.step_tasks import step_operator

if TYPE_CHECKING:
    from qlora_retrain.config.line import LineConfig

CLI_MODULE = "qlora_retrain.cli"
# Of a move, in names and messages.
MOVE = "move"


class PublishCommand(Protocol):
    """A command that runs in one of the runtimes."""

    def run_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> Ending:
        """Run `qlora-retrain` with these arguments to its end.

        Args:
            arguments: The command line.
            run_id: The DAG run's id in the store; a repeated command of it follows what the first one started.
            timeout: How long it may take.

        Raises:
            Problem: If it could not be run.
        """

    def stop_step(self) -> None:
        """Stop the command at its deadline."""

    def on_kill(self) -> None:
        """Stop the command because Airflow ends the task."""


def publish_command(config: LineConfig) -> PublishCommand:
    """Return the command of the runtime that the platform has for a line."""
    step = graph.step(graph.producer_name("release"))
    operator, arguments = step_operator(step, config)
    if operator is LocalStepOperator:
        return LocalCommand(**arguments)
    if "profile" in arguments:
        from qlora_retrain.runtimes.airflow.publish_pod import KubernetesCommand

        return KubernetesCommand(**arguments)
    from qlora_retrain.runtimes.airflow.publish_container import DockerCommand

    return DockerCommand(**arguments)


class LocalCommand(LocalStepOperator):
    """A subprocess of the worker."""

    command = MOVE

    def run_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> Ending:
        """Run the command; its output goes to the task's log."""
        output, exit_code = self.run_process([sys.executable, "-m", CLI_MODULE, *arguments])
        return with_reason_first(Ending.from_process(self.command, exit_code, None, output.last_lines))


def with_reason_first(ending: Ending) -> Ending:
    """Return a command's ending without what it printed before its error."""
    _, mark, message = ending.reason.rpartition("qlora-retrain: ")
    reason = message.partition(BEFORE_THAT)[0] if mark else ending.reason
    return dataclasses.replace(ending, reason=reason)
