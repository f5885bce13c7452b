"""How long each task of a run may take, in every runtime; a task that takes longer ends with 12 and is not tried again.

    training           train.max_hours (a week where it is null), and two hours to fetch, to start and to upload
    every other task   runtime.max_step_hours of platform.yaml
    a mirror           4 hours a try, of three
    the whole run      all of them one after another; in Kubeflow the profile has the hours, since it knows no line

Training stops by itself when its budget is used up, and saves. The deadline is for one that does not come so far.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from qlora_retrain.config import platform
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.line import LineConfig
    from qlora_retrain.pipeline.plan import Plan

# Of training without a budget of its own. The form of a run allows as much, whatever the line says.
TRAINING_HOURS = 168.0
# Gigabytes of a base are fetched before the budget begins, and a checkpoint is uploaded after it.
MARGIN_HOURS = 2.0
# Of a version that goes to another registry: gigabytes over a slow line.
MIRROR_TIMEOUT, MIRROR_RETRIES = timedelta(hours=4), 2


def task_timeout(
    task: str, max_step_hours: float = RuntimeConfig().max_step_hours, max_training_hours: float | None = None
) -> timedelta:
    """Return how long a try of a task may take.

    Args:
        task: A step's name, or that of another task, such as task 0.
        max_step_hours: The platform's `runtime.max_step_hours`.
        max_training_hours: `train.max_hours` of the line, or of the run's plan.
    """
    if not _is_training(task):
        return timedelta(hours=max_step_hours)
    return timedelta(hours=(max_training_hours or TRAINING_HOURS) + MARGIN_HOURS)


def line_timeout(config: LineConfig, task: str) -> timedelta:
    """Return how long a try of a task of this line may take."""
    return task_timeout(task, _max_step_hours(config), config.train.max_hours)


def planned_timeout(plan: Plan, step: str, timeout: timedelta) -> timedelta:
    """Return how long a try of a step of this plan may take: `timeout`, and for training as its budget there says."""
    return task_timeout(step, 0.0, plan.step(step).config["max_hours"]) if _is_training(step) else timeout


def run_timeout(config: LineConfig) -> timedelta:
    """Return how long a run may take: every task its full time, and training what the form allows."""
    training_hours = max_form_hours(config.train.max_hours)
    tasks = (graph.PLAN_TASK, *(step.name for step in graph.STEPS))
    # Mirrors run beside each other.
    mirrors = MIRROR_TIMEOUT * (MIRROR_RETRIES + 1) if config.publish.mirror else timedelta()
    return sum((task_timeout(task, _max_step_hours(config), training_hours) for task in tasks), mirrors)


def max_form_hours(line_hours: float | None) -> float:
    """Return the largest `train.max_hours` for a run by hand; a larger one needs the line's YAML."""
    return max(line_hours or 0.0, TRAINING_HOURS)


def ending(task: str, timeout: timedelta) -> Ending:
    """Return the ending of a task that was stopped at its deadline."""
    return Ending.from_problem(task, UsageError(message(task, timeout), cause=Cause.TIME_BUDGET))


def message(task: str, timeout: timedelta) -> str:
    """Return what happened to a task that took longer than this, and the setting that gives it more time."""
    hours = f"{timeout.total_seconds() / 3600:g} hours"
    if not _is_training(task):
        return (
            f"stopped at its deadline, after {hours}; if it needs more, raise runtime.max_step_hours in platform.yaml"
        )
    return (
        f"stopped at its deadline, after {hours}: train.max_hours and {MARGIN_HOURS:g} hours to fetch and to upload; "
        "raise train.max_hours to go on from the last checkpoint"
    )


def _max_step_hours(config: LineConfig) -> float:
    return platform.load().runtime_of(config.line).max_step_hours


def _is_training(task: str) -> bool:
    # Only the step that keeps checkpoints has a budget of its own, and can go on where it was stopped.
    return any(step.name == task and step.scratch for step in graph.STEPS)
