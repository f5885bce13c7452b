"""The command line of a step, the same everywhere.

Command: `python -m components.<step> --plan URI`
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from qlora_retrain.core import graph, visible_text
from qlora_retrain.core.arguments import ANY_ALIAS, Parser
from qlora_retrain.core.bounds import Watchdog
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Exit, Problem, UsageError
from qlora_retrain.pipeline import execute, kfp_outputs, run_endings
from qlora_retrain.pipeline.execute import StepFunction as StepFunction  # the components import it from here
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import actor


def main(step_name: str, load: Callable[[], StepFunction]) -> NoReturn:
    """Run the step of a plan, write its ending and end the process with its exit code."""
    visible_text.protect_output()
    parser = Parser(prog=f"python -m components.{step_name}", description=graph.step(step_name).summary)
    parser.add_argument("--plan", required=True, metavar="URI", help="the run's plan.json")
    parser.add_argument("--line", metavar="NAME", help="refuse a plan of another line")
    parser.add_argument("--root", metavar="URI", help="refuse a plan of another store")
    parser.add_argument("--alias", default=ANY_ALIAS, metavar="NAME", help="refuse to move another alias; empty: none")
    parser.add_argument("--report-to", type=Path, metavar="FILE", help="copy the step's report there")
    parser.add_argument("--ending-to", type=Path, metavar="FILE", help="write the step's ending (JSON) there")
    parser.add_argument("--triggered-by", metavar="SYSTEM:NAME", help="for the audit trail, e.g. airflow:alice")
    parser.add_argument("--reason", metavar="TEXT", help="why the run was started, for the audit trail; as in a URL")
    parser.add_argument("--executor-input", metavar="JSON", help="from KFP: says where to write the step's numbers")
    arguments = parser.parse_args()

    # It stays None where the plan cannot be loaded; then the ending is not written to the store.
    plan = None
    try:
        if arguments.triggered_by:
            actor.name_orchestrator(arguments.triggered_by)
        if arguments.reason:
            actor.state_run_reason(unquote(arguments.reason))
        loaded = Plan.load(arguments.plan)
        # A foreign plan's run gets no ending from this step.
        loaded.refuse_other(line=arguments.line, root=arguments.root, alias=arguments.alias or None)
        plan = loaded
        Watchdog.end_process = partial(_end_process, plan, step_name, arguments.ending_to)
        ending = execute.run_step(plan, step_name, load)
        kfp_outputs.copy(plan, step_name, report_to=arguments.report_to, executor_input=arguments.executor_input)
    except Problem as problem:  # outside the step: no plan, no store, or stopped while its log was uploaded
        ending = Ending.from_problem(step_name, problem)
        print(ending.sentence(), file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 - our own bug, outside the step; it has an ending too
        traceback.print_exc()
        ending = Ending.from_exit_code(step_name, Exit.BUG, f"{type(error).__name__}: {error}")

    is_over = run_endings.write(
        ending,
        root=plan.root if plan else None,
        run_id=plan.run_id if plan else None,
        ending_to=arguments.ending_to,
    )
    if not is_over:
        # A plain exit would wait for the threads of the store's client, for as long as the store does not answer.
        os._exit(ending.code)
    sys.exit(ending.code)


def _end_process(plan: Plan, step_name: str, ending_to: Path | None, reason: str) -> NoReturn:
    """Write the ending of a step that hangs in native code, and end the process."""
    ending = Ending.from_problem(step_name, UsageError(reason), key=plan.step(step_name).key)
    print(ending.sentence(), file=sys.stderr, flush=True)
    run_endings.write(ending, root=plan.root, run_id=plan.run_id, ending_to=ending_to)
    os._exit(ending.code)
