"""The whole pipeline without an orchestrator: a subprocess a step, steps that do not wait for each other side by side.

Command: `qlora-retrain run CONFIG --root URI`
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from qlora_retrain.core import graph, progress, supervisor
from qlora_retrain.core.errors import Exit, Problem, describe, may_retry
from qlora_retrain.pipeline import execute
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan

_GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.1


def command(step_name: str, plan_uri: str) -> list[str]:
    """The one command line of a step."""
    return [sys.executable, "-m", f"components.{step_name}", "--plan", plan_uri]


def environment() -> dict[str, str]:
    """This process's environment, with the components importable."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(project_root()), os.environ.get("PYTHONPATH", "")])}


class _Child:
    """A step that runs, its output passed on line by line."""

    def __init__(self, step: graph.Step, plan: Plan, attempt: int) -> None:
        self.step, self.attempt = step, attempt
        self.process = subprocess.Popen(
            supervisor.command(command(step.name, plan.uri), grace_seconds=_GRACE_SECONDS),
            cwd=project_root(),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours to pass on, once
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                text = line.rstrip()
                update = progress.parsed(text)
                if update is None:
                    progress.say(text if text.startswith(f"{self.step.name}:") else f"{self.step.name} | {text}")
                else:
                    _show(self.step.name, update)

    def ended(self) -> int | None:
        """The exit code, once there is one and all output was passed on."""
        code = self.process.poll()
        if code is not None:
            self._reader.join()
        return code


def run(plan: Plan) -> int:
    """Run every step of a plan that is not made, in the graph's order; stop at the first that fails.

    Returns:
        0, or the exit code of the step that stopped the run; 130 after Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    done: set[str] = set()
    running: list[_Child] = []
    try:
        while len(done) < len(graph.STEPS):
            code = _start_ready(plan, done, running)
            if code is None:
                code = _collect(plan, done, running)
            if code:
                return code
            time.sleep(_POLL_SECONDS)
        return Exit.DONE
    except KeyboardInterrupt:
        progress.say("stopping: the steps that run get a minute to save their work")
        return 130
    finally:
        for child in running:
            child.process.terminate()  # the leash allows the step the grace period, then kills it
        for child in running:
            child.process.wait()


def _start_ready(plan: Plan, done: set[str], running: list[_Child]) -> int | None:
    """Start what waits for nothing; the exit code of an artifact that was refused before, or None."""
    for step in graph.STEPS:
        if step.name in done or any(c.step is step for c in running) or not done.issuperset(graph.after(step)):
            continue
        found = execute.found(plan, step.name)
        if found is None:
            running.append(_Child(step, plan, attempt=0))
        elif found:
            progress.say(execute.refused_before(plan, step.name))
            return found
        else:
            progress.say(f"{step.name}: made already: {progress.one_line(execute.summary(plan, step.name))}")
            done.add(step.name)
    return None


def _collect(plan: Plan, done: set[str], running: list[_Child]) -> int | None:
    for child in list(running):
        code = child.ended()
        if code is None:
            continue
        running.remove(child)
        if code == 0 and _made(plan, child.step.name):
            done.add(child.step.name)
        elif code == 0:
            progress.say(f"{child.step.name}: ended as if done, but its {child.step.makes} is not there")
            return Exit.BUG
        elif may_retry(code) and child.attempt < child.step.retries:
            progress.say(f"{child.step.name}: {describe(code)}; try {child.attempt + 2} of {child.step.retries + 1}")
            time.sleep(min(30.0, 2.0**child.attempt))
            running.append(_Child(child.step, plan, child.attempt + 1))
        else:
            log = f"{plan.root}/runs/{plan.run_id}/logs"
            progress.say(f"run {plan.run_id} stopped at {child.step.name}: {describe(code)} ({code}); logs: {log}")
            return code
    return None


def _made(plan: Plan, step_name: str) -> bool:
    """Success is judged by the manifest, never by the process's word alone."""
    try:
        return execute.found(plan, step_name) == Exit.DONE
    except Problem as problem:
        progress.say(f"{step_name}: {problem}")
        return False


def _show(step_name: str, update: Mapping[str, Any]) -> None:
    line = progress.one_line(progress.numbers_of(update))
    progress.say(f"{step_name} | {update['what']} {update['done']:g}/{update['total']:g}  {line}")


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
