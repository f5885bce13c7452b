"""A run's progress in a terminal: one line a step with its state, its time and its own number.

On a terminal the lines are redrawn in place; otherwise a line is printed when a step's state changes, and every few
seconds while it works. Reads the task states of Airflow, the run's `status/<step>.json` and the artifacts' manifests.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

from qlora_retrain.core import graph, hashing, progress
from qlora_retrain.core.errors import Problem
from qlora_retrain.demo.airflow_api import TaskState
from qlora_retrain.pipeline import execute
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import NotFound

ORDER = (graph.PLAN_TASK, *(s.name for s in graph.STEPS))
WORDS = {
    None: "waiting",
    "scheduled": "waiting",
    "queued": "waiting",
    "running": "running",
    "success": "done",
    "up_for_retry": "will retry",
    "failed": "failed",
    "upstream_failed": "not run",
}
_REPEAT_SECONDS = 10.0
_NUMBERS = 3


class Board:
    """The lines of one run; `plan` is set as soon as there is one."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self._live = sys.stdout.isatty()
        self._drawn = 0
        self._said: dict[str, tuple[str, float]] = {}
        self._final: dict[str, str] = {}

    def show(self, tasks: Sequence[TaskState]) -> None:
        """Bring the terminal up to date."""
        found = {task.name: task for task in tasks}
        rows = [found[name] for name in ORDER if name in found]
        if not self._live:
            for task in rows:
                self._say(task)
            return
        width = shutil.get_terminal_size().columns - 1
        text = "".join(f"\x1b[2K{self._line(task)[:width]}\n" for task in rows)
        print(f"\x1b[{self._drawn}A{text}" if self._drawn else text, end="", flush=True)
        self._drawn = len(rows)

    def _say(self, task: TaskState) -> None:
        word, now = WORDS.get(task.state, str(task.state)), time.monotonic()
        before, at = self._said.get(task.name, ("waiting", now))
        if word != before or (word == "running" and now - at >= _REPEAT_SECONDS):
            self._said[task.name] = (word, now)
            print(self._line(task), flush=True)

    def _line(self, task: TaskState) -> str:
        word = WORDS.get(task.state, str(task.state))
        again = f" (try {task.tries})" if task.tries > 1 else ""
        elapsed = f"{task.seconds:6.0f} s" if task.seconds else " " * 8
        return f"  {task.name:<15} {word + again:<10} {elapsed}  {self._number(task)}".rstrip()

    def _number(self, task: TaskState) -> str:
        if self.plan is None or task.state not in ("running", "success"):
            return ""
        if task.name == graph.PLAN_TASK:
            return f"run {self.plan.run_id}"
        if self.plan.unchanged:
            return "nothing to do"
        if task.state == "running":
            return _status(self.plan, task.name)
        if task.name not in self._final:
            self._final[task.name] = _result(self.plan, task.name)
        return self._final[task.name]


def _status(plan: Plan, step: str) -> str:
    """How far a step says it is."""
    try:
        update = hashing.parse(open_store(plan.root).read(f"runs/{plan.run_id}/status/{step}.json").data)
        numbers = {k: v for k, v in update.items() if k not in ("what", "done", "total")}
        return f"{update['what']} {update['done']:g}/{update['total']:g}  {progress.one_line(numbers)}"
    except (NotFound, ValueError, KeyError):
        return ""


def _result(plan: Plan, step: str) -> str:
    """The first numbers of what a step made; a step's report begins with what matters."""
    try:
        numbers = execute.summary(plan, step)
    except Problem:
        return ""
    numbers.pop("outcome", None)
    return progress.one_line(dict(list(numbers.items())[:_NUMBERS]))
