"""The command line of a step, the same everywhere.

Command: `python -m components.<step> --plan URI`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from qlora_retrain.core import graph
from qlora_retrain.core.arguments import Parser
from qlora_retrain.core.errors import Problem
from qlora_retrain.pipeline import execute, kfp_outputs
from qlora_retrain.pipeline.execute import Run as Run  # what a component's program loads
from qlora_retrain.pipeline.plan import Plan


def main(step_name: str, load: Callable[[], Run]) -> NoReturn:
    """Run the step of a plan and end the process with its exit code."""
    parser = Parser(prog=f"python -m components.{step_name}", description=graph.step(step_name).summary)
    parser.add_argument("--plan", required=True, metavar="URI", help="the run's plan.json")
    parser.add_argument("--report-to", type=Path, metavar="FILE", help="copy the step's report there")
    parser.add_argument("--executor-input", metavar="JSON", help="Kubeflow's: where it wants the step's numbers")
    arguments = parser.parse_args()
    try:
        plan = Plan.load(arguments.plan)
        code = execute.execute(plan, step_name, load)
        kfp_outputs.tell(plan, step_name, report_to=arguments.report_to, executor_input=arguments.executor_input)
        sys.exit(code)
    except Problem as problem:  # outside the step: no plan, no store, or stopped while its log was kept
        sys.exit(execute.ended(step_name, problem.exit_code, str(problem)))
