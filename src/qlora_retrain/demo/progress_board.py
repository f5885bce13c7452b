"""A run's progress in a terminal: one line per step with its state, its time and its main numbers.

On a terminal the lines are redrawn in place. Elsewhere a line is printed when a step's state changes, and every ten
seconds while it runs. Reads the task states of Airflow, the run's `status/<step>.json` and the artifacts' manifests.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

from qlora_retrain.core import graph, progress
from qlora_retrain.core.errors import Problem
from qlora_retrain.demo.airflow_api import TaskState
from qlora_retrain.pipeline import status
from qlora_retrain.pipeline.plan import Plan

TASK_ORDER = (graph.PLAN_TASK, *(s.name for s in graph.STEPS))
STATE_LABELS = {
    None: "waiting",
    "scheduled": "waiting",
    "queued": "waiting",
    "running": "running",
    "success": "done",
    "up_for_retry": "will retry",
    "failed": "failed",
    "upstream_failed": "not run",
}
_REPRINT_SECONDS = 10.0
_MAX_NUMBERS = 3  # what fits on a line beside the state and the time


class ProgressBoard:
    """The lines of one run; `plan` is set as soon as there is one."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self._is_terminal = sys.stdout.isatty()
        self._lines_on_screen = 0
        self._last_printed: dict[str, tuple[str, float]] = {}  # task -> (state's label, when in monotonic seconds)
        self._final_numbers: dict[str, str] = {}

    def show(self, tasks: Sequence[TaskState]) -> None:
        """Print the state of the tasks."""
        # Airflow returns the tasks in no fixed order; they are shown in the graph's.
        task_by_id = {task.task_id: task for task in tasks}
        rows = [task_by_id[task_id] for task_id in TASK_ORDER if task_id in task_by_id]

        if not self._is_terminal:
            for task in rows:
                self._print_if_changed(task)
            return

        # A line that wraps takes two rows on the screen, and the cursor would then move up too few.
        width = shutil.get_terminal_size().columns - 1
        text = "".join(f"\x1b[2K{self._format_line(task)[:width]}\n" for task in rows)
        print(f"\x1b[{self._lines_on_screen}A{text}" if self._lines_on_screen else text, end="", flush=True)
        self._lines_on_screen = len(rows)  # how far up the next redraw begins

    def _print_if_changed(self, task: TaskState) -> None:
        label, now = STATE_LABELS.get(task.state, str(task.state)), time.monotonic()
        # The first "waiting" of a task is no change, so it is not printed.
        last_label, printed_at = self._last_printed.get(task.task_id, ("waiting", now))
        if label != last_label or (label == "running" and now - printed_at >= _REPRINT_SECONDS):
            self._last_printed[task.task_id] = (label, now)
            print(self._format_line(task), flush=True)

    def _format_line(self, task: TaskState) -> str:
        label = STATE_LABELS.get(task.state, str(task.state))
        retry = f" (try {task.try_number})" if task.try_number > 1 else ""
        elapsed = f"{task.duration_seconds:6.0f} s" if task.duration_seconds else " " * 8
        return f"  {task.task_id:<15} {label + retry:<10} {elapsed}  {self._format_numbers(task)}".rstrip()

    def _format_numbers(self, task: TaskState) -> str:
        """Return what a task's line ends with: its progress while it runs, its results once it succeeded."""
        if self.plan is None or task.state not in ("running", "success"):
            return ""
        if task.task_id == graph.PLAN_TASK:
            return f"run {self.plan.run_id}"
        if self.plan.unchanged:
            return "nothing to do"
        if task.state == "running":
            return _read_progress(self.plan, task.task_id)

        # A manifest never changes, so it is read from the store once.
        if task.task_id not in self._final_numbers:
            self._final_numbers[task.task_id] = _read_results(self.plan, task.task_id)
        return self._final_numbers[task.task_id]


def _read_progress(plan: Plan, step: str) -> str:
    """Return the step's last progress update as text; empty where there is none."""
    return status.progress_text(plan, step) or ""


def _read_results(plan: Plan, step: str) -> str:
    """Return the first numbers of a step's manifest; a step puts the most important ones first."""
    try:
        numbers = status.numbers(plan, step)
    except Problem:
        return ""
    numbers.pop("outcome", None)
    return progress.format_numbers(dict(list(numbers.items())[:_MAX_NUMBERS]))
