"""Copy a step's report and numbers to where Kubeflow's UI shows them.

The artifact in the store is the result. This is a copy for a UI, and losing it never fails a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_retrain.core import progress
from qlora_retrain.core.errors import Problem
from qlora_retrain.core.outcome import Number
from qlora_retrain.pipeline import run_page, status
from qlora_retrain.pipeline.plan import Plan

NUMBERS = "numbers"  # the name of the output artifact that carries them


def copy(plan: Plan, step_name: str, *, report_to: Path | None, executor_input: str | None) -> None:
    """Copy the step's report and its numbers, as far as the orchestrator asks for them.

    Args:
        plan: The run's plan.
        step_name: The step.
        report_to: The file that the UI shows; None where it shows none.
        executor_input: KFP's JSON that says where outputs go; None outside KFP. It is the only way to output artifacts.
    """
    try:
        if report_to is not None:
            write_file(report_to, run_page.step_page(plan, step_name) or run_page.page(plan))
        # KFP reads this file after the container ended, and shows the numbers beside the task.
        if executor_input is not None:
            outputs = json.loads(executor_input)["outputs"]
            document = metrics(outputs["artifacts"], status.numbers(plan, step_name))
            write_file(Path(outputs["outputFile"]), json.dumps(document))
    except (Problem, OSError, ValueError, LookupError, TypeError) as error:
        progress.say(f"{step_name}: its report could not be copied to the orchestrator: {error!r}")


def metrics(artifacts: Mapping[str, Any], numbers: Mapping[str, Number]) -> dict[str, Any]:
    """Return KFP's `ExecutorOutput` that gives the artifact `numbers` its values; KFP takes finite numbers only."""
    finite = {
        name: value
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    # KFP passes a list with exactly one artifact for each output.
    output = artifacts[NUMBERS]["artifacts"][0]
    return {"artifacts": {NUMBERS: {"artifacts": [{"name": output["name"], "uri": output["uri"], "metadata": finite}]}}}


def write_file(path: Path, text: str) -> None:
    """Write a file whose folder may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
