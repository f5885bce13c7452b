"""A command of `qlora-retrain` in a container, with the account of the step `publish`; see `publish_command.py`."""

from __future__ import annotations

from datetime import timedelta

from qlora_retrain.core.endings import Ending
from qlora_retrain.runtimes.airflow.dag_run import store_root
from qlora_retrain.runtimes.airflow.docker import DockerStepOperator
from qlora_retrain.runtimes.airflow.publish_command import CLI_MODULE, MOVE, with_reason_first


class DockerCommand(DockerStepOperator):
    """A container of the image of `publish` that writes below `models/` of its line alone."""

    def run_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> Ending:
        """Run the command, or follow the container that an earlier try of the same DAG run left."""
        command = ["python", "-m", CLI_MODULE, *arguments]
        root, folders = store_root(), [f"models/{self.line}"]
        output, exit_code = self.run_container(
            f"qlora-retrain-{MOVE}-{run_id}", lambda: self.create_container(command, root, folders)
        )
        return with_reason_first(Ending.from_process(MOVE, exit_code, None, output.last_lines))
