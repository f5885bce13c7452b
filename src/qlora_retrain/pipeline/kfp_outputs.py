"""What a step hands to an orchestrator that shows reports and numbers of its own: Kubeflow.

The artifact in the store is the result; this is a copy for a UI, and losing it never fails a step.
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
from qlora_retrain.pipeline import execute, run_page
from qlora_retrain.pipeline.plan import Plan

NUMBERS = "numbers"  # the output artifact that carries them


def tell(plan: Plan, step_name: str, *, report_to: Path | None, executor_input: str | None) -> None:
    """Copy the step's report and its numbers.

    Args:
        plan: The run's plan.
        step_name: The step.
        report_to: The file that the UI shows.
        executor_input: KFP's message about where outputs go; it is the only thing that KFP fills into a command.
    """
    try:
        if report_to is not None:
            put(report_to, run_page.step_page(plan, step_name) or run_page.page(plan))
        if executor_input is not None:
            outputs = json.loads(executor_input)["outputs"]
            document = metrics(outputs["artifacts"], execute.summary(plan, step_name))
            put(Path(outputs["outputFile"]), json.dumps(document))
    except (Problem, OSError, ValueError, LookupError, TypeError) as error:
        progress.say(f"{step_name}: its report was not handed over: {error!r}")


def metrics(artifacts: Mapping[str, Any], numbers: Mapping[str, Number]) -> dict[str, Any]:
    """KFP's `ExecutorOutput` that gives the artifact `numbers` its values; KFP keeps numbers alone, and finite ones."""
    finite = {
        name: value
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    made = artifacts[NUMBERS]["artifacts"][0]
    return {"artifacts": {NUMBERS: {"artifacts": [{"name": made["name"], "uri": made["uri"], "metadata": finite}]}}}


def put(path: Path, text: str) -> None:
    """Write a file whose folder may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
