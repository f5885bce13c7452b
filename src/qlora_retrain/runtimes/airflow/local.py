"""An Airflow task that runs a step as a subprocess of the worker, in the same virtual environment.

The step's output goes to the task's log. A task that is killed asks its step to stop and allows it a minute (`leash`).
Nothing is put through a shell.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

from qlora_retrain.core import errors, supervisor
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes import local
from qlora_retrain.runtimes.airflow.operators import StepOperator, fail

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

GRACE_SECONDS = 60.0
_LONGEST_LINE = 64 * 1024


class LocalStepOperator(StepOperator):
    """One step of the graph as a subprocess; arguments as `StepOperator`'s."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process: subprocess.Popen[str] | None = None

    def run_step(self, plan: Plan, context: Context) -> None:
        """Run it on a leash."""
        with subprocess.Popen(
            supervisor.command(local.command(self.step, plan.uri), grace_seconds=GRACE_SECONDS),
            cwd=code_identity.project_root(),
            env=_environment(),
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
            reason = self.last_lines(iter(lambda: stream.readline(_LONGEST_LINE), ""))
        if self._process.returncode != errors.Exit.DONE:
            fail(self._process.returncode, reason)

    def on_kill(self) -> None:
        """Ask the step to stop; the leash allows it `GRACE_SECONDS` and outlives this task if need be."""
        if self._process is not None:
            self._process.terminate()


def _environment() -> dict[str, str]:
    """This process's environment without Airflow's own settings, which hold its database and signing keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW_", "_AIRFLOW"))}
    return {**kept, "PYTHONUNBUFFERED": "1"}
