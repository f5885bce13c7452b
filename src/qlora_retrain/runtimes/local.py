"""Run the whole pipeline without an orchestrator: one subprocess per step, independent steps side by side.

Command: `qlora-retrain run CONFIG --root URI`
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import endings, graph, progress, supervisor
from qlora_retrain.core.endings import Ending, Kind
from qlora_retrain.core.errors import Exit, Problem, describe
from qlora_retrain.pipeline import run_endings, status
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes import credentials, deadlines

_GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.1


def step_command(step_name: str, plan_uri: str) -> list[str]:
    """Build the one command line of a step."""
    return [sys.executable, "-m", f"components.{step_name}", "--plan", plan_uri]


def step_environment() -> dict[str, str]:
    """Copy this process's environment, with the components importable."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(project_root()), os.environ.get("PYTHONPATH", "")])}


class _StepProcess:
    """A running step, whose output is printed line by line."""

    def __init__(self, step: graph.Step, plan: Plan, attempt: int, max_step_hours: float) -> None:
        self.step, self.attempt = step, attempt
        self._timeout = deadlines.planned_timeout(plan, step.name, deadlines.task_timeout(step.name, max_step_hours))
        self._deadline = time.monotonic() + self._timeout.total_seconds()
        self._is_overdue = False
        self._written_ending: Ending | None = None
        self.process = subprocess.Popen(
            supervisor.supervised_command(step_command(step.name, plan.uri), grace_seconds=_GRACE_SECONDS),
            cwd=project_root(),
            env=credentials.step_environment(step_environment(), step, plan.line),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C must not reach the step directly: `run` passes it on, once
        )
        # Read in a thread, so that a step that prints much never waits for space in the pipe.
        self._reader = threading.Thread(target=self._forward_output, daemon=True)
        self._reader.start()

    def _forward_output(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                text = line.rstrip()
                # Progress updates are JSON, which a person should not have to read.
                update = progress.parse_update(text)
                if ending := endings.from_line(text):
                    self._written_ending = ending
                elif not text:
                    continue  # the line break that comes before an ending, for example
                elif update is None:
                    progress.say(text if text.startswith(f"{self.step.name}:") else f"{self.step.name} | {text}")
                else:
                    _print_progress(self.step.name, update)

    def poll_ending(self) -> Ending | None:
        """Return how the step ended, once it has and all its output was printed."""
        # The exit code exists before the last output was read, and the ending is in that output.
        exit_code = self.process.poll()
        if exit_code is None:
            self._stop_if_overdue()
            return None
        self._reader.join()
        ending = Ending.from_process(self.step.name, exit_code, self._written_ending)
        # A step that is stopped says that it may be tried again, but it would need as long.
        return deadlines.ending(self.step.name, self._timeout) if self._is_overdue and ending.retry else ending

    def _stop_if_overdue(self) -> None:
        if not self._is_overdue and time.monotonic() > self._deadline:
            self._is_overdue = True
            progress.say(f"{self.step.name}: {deadlines.message(self.step.name, self._timeout)}")
            self.process.terminate()  # the supervisor allows the step its grace period, then kills it

    @property
    def has_written_ending(self) -> bool:
        """Whether the step wrote the ending that counts, and so put it into the run's folder too."""
        written = self._written_ending is not None and self._written_ending.code == self.process.returncode
        return written and not self._is_overdue


def run(plan: Plan, until: str | None = None, *, max_step_hours: float = RuntimeConfig().max_step_hours) -> int:
    """Run every step of a plan whose artifact is missing, in the graph's order; stop at the first that fails.

    Args:
        plan: The run's.
        until: The last step to run; only the steps that it needs run before it. None: the whole graph.
        max_step_hours: The platform's `runtime.max_step_hours`.

    Returns:
        0, or the exit code of the step that stopped the run; 130 after Ctrl-C.
    """
    # A service manager stops this process with SIGTERM; the steps are then stopped as after Ctrl-C.
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    steps = graph.steps_until(until)
    completed: set[str] = set()
    running: list[_StepProcess] = []

    try:
        while len(completed) < len(steps):
            exit_code = _start_ready_steps(plan, steps, completed, running, max_step_hours)
            if exit_code is None:
                exit_code = _reap_ended_steps(plan, completed, running, max_step_hours)
            if exit_code:
                return exit_code
            time.sleep(_POLL_SECONDS)
        return Exit.DONE

    except KeyboardInterrupt:
        progress.say(f"stopping: running steps get {_GRACE_SECONDS:.0f} s to save their work")
        return 130

    finally:
        # Signal all of them before waiting for any, so that their grace periods run at the same time.
        for child in running:
            child.process.terminate()  # the supervisor allows the step its grace period, then kills it
        for child in running:
            child.process.wait()


def _start_ready_steps(
    plan: Plan,
    steps: Sequence[graph.Step],
    completed: set[str],
    running: list[_StepProcess],
    max_step_hours: float,
) -> int | None:
    """Start every step whose inputs are complete.

    Returns:
        The exit code of an artifact that an earlier run refused; None where there is none.
    """
    for step in steps:
        if (
            step.name in completed
            or any(child.step is step for child in running)
            or not completed.issuperset(graph.upstream_steps(step))
        ):
            continue

        # The artifact may be in the store from an earlier run, or from another orchestrator.
        exit_code = status.exit_code(plan, step.name)
        if exit_code is None:
            running.append(_StepProcess(step, plan, 0, max_step_hours))
        elif exit_code:
            progress.say(status.earlier_refusal(plan, step.name).sentence())
            return exit_code
        else:
            numbers = status.numbers(plan, step.name)
            text = f"made already: {progress.format_numbers(numbers)}" if numbers else status.nothing_to_do(plan)
            progress.say(f"{step.name}: {text}")
            completed.add(step.name)
    return None


def _reap_ended_steps(
    plan: Plan, completed: set[str], running: list[_StepProcess], max_step_hours: float
) -> int | None:
    """Remove the steps that ended from the list and decide about each: completed, tried again, or the end of the run.

    Returns:
        The exit code that stops the run; None while it goes on.
    """
    # A copy, because the loop changes the list.
    for child in list(running):
        ending = child.poll_ending()
        if ending is None:
            continue

        running.remove(child)
        # A step that was killed could not write its ending to the run's folder.
        if ending.code and not child.has_written_ending:
            run_endings.write_to_store(plan.root, plan.run_id, ending)

        if ending.kind == Kind.DONE and _has_artifact(plan, child.step.name):
            completed.add(child.step.name)
        # An exit code of 0 without an artifact is a bug, so it is not retried.
        elif ending.kind == Kind.DONE:
            progress.say(f"{child.step.name}: exited with 0, but its {child.step.makes} is not in the store")
            return Exit.BUG
        elif ending.retry and child.attempt < child.step.retries:
            progress.say(
                f"{child.step.name}: {describe(ending.code)}; try {child.attempt + 2} of {child.step.retries + 1}"
            )
            # 1, 2, 4, ... up to 30 seconds: a throttled store or a full disk often recovers in that time.
            time.sleep(min(30.0, 2.0**child.attempt))
            running.append(_StepProcess(child.step, plan, child.attempt + 1, max_step_hours))
        else:
            logs = f"{plan.root}/runs/{plan.run_id}/logs"
            progress.say(
                f"run {plan.run_id} stopped at {child.step.name}: {describe(ending.code)} ({ending.code}); logs: {logs}"
            )
            return ending.code
    return None


def _has_artifact(plan: Plan, step_name: str) -> bool:
    """Return whether the step's manifest says that it succeeded; the exit code of the process alone is no proof."""
    try:
        return status.exit_code(plan, step_name) == Exit.DONE
    except Problem as problem:
        progress.say(f"{step_name}: {problem}")
        return False


def _print_progress(step_name: str, update: Mapping[str, Any]) -> None:
    # One line for each update and no bar, because several steps may print at the same time.
    numbers = progress.format_numbers(progress.extra_numbers(update))
    progress.say(f"{step_name} | {update['what']} {update['done']:g}/{update['total']:g}  {numbers}")


def _raise_keyboard_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
