"""What Airflow's UI says about a line, its plan and its steps: the contract first, then the component's own page.

Everything here follows from the graph, the table of exit codes and the READMEs of `components/`; a line's description
is the only text of an author.
"""

from __future__ import annotations

import re
from datetime import timedelta
from functools import cache

from qlora_retrain.config.line import LineConfig
from qlora_retrain.core import errors, graph
from qlora_retrain.core.graph import Step
from qlora_retrain.pipeline import code_identity

# A link to another file of the checkout leads nowhere in Airflow's UI.
_LINK_TO_FILE = re.compile(r"\[([^\]]+)\]\((?!https?://)[^)\n]*\)")


def line_doc(config: LineConfig, file_name: str) -> str:
    """Return the text about a line's DAG."""
    steps = "\n".join(f"1. **{step.title}** (`{step.name}`): {step.summary}" for step in graph.STEPS)
    return (
        f"{config.description}\n\n"
        f"A run of `{file_name}` plans what has to be done, and then runs every step whose artifact does not exist:\n\n"
        f"{steps}\n\n"
        "The run's note says how it ended: the version, the verdict and its numbers, or the reason of the failure. "
        "Whoever starts a run by hand can ask for a dry run, which says what would run and why."
    )


def plan_doc(config: LineConfig, file_name: str) -> str:
    """Return the text about task 0."""
    return (
        f"Reads `{file_name}`, pins the sources of `{config.line}`, and writes the plan `runs/<run_id>/plan.json`. "
        "Its log says what will run and why. A cleared run keeps its plan; a dry run keeps none.\n\n"
        f"{_exit_codes()}"
    )


def step_doc(step: Step, retries: int, timeout: timedelta) -> str:
    """Return the text about a step's task.

    Args:
        step: The step.
        retries: How often the task is tried again.
        timeout: How long a try may take.
    """
    reads = "\n".join(f"| `{source.name}` | {_meaning(source.name)} |" for source in step.reads)
    return (
        f"{step.summary}\n\n"
        f"Makes `{step.makes}`, in the image `{step.image}`{f', on {step.gpus} GPU or more' if step.gpus else ''}. "
        f"If it exists already, the task ends at once. A try may take {timeout / timedelta(hours=1):g} hours; the task "
        f"is tried again {retries} times where that may help"
        f"{', and goes on from the last checkpoint' if step.scratch else ''}.\n\n"
        f"| reads | |\n|---|---|\n{reads}\n\n{_exit_codes()}\n\n---\n\n{_readme(step)}"
    )


def _meaning(name: str) -> str:
    source = next((source for source in graph.SOURCES if source.name == name), None)
    if source is None:
        return f"made by {graph.step(graph.producer_name(name)).title}"
    return source.meaning + (" (optional)" if source.optional else "")


@cache
def _exit_codes() -> str:
    """Return the table of exit codes, and what the task does after each."""
    rows = "\n".join(f"| {code:d} | {errors.MEANING[code]} | {_consequence(code)} |" for code in errors.MEANING)
    return f"| exit code | meaning | the task |\n|---|---|---|\n{rows}"


def _consequence(code: errors.Exit) -> str:
    if code == errors.Exit.DONE:
        return "succeeds"
    if errors.is_refusal(code):
        return "fails at once, on purpose: the report says why"
    return "is tried again" if errors.may_retry(code) else "fails at once"


@cache
def _readme(step: Step) -> str:
    """Return the page of the step's component; a step without one has its summary."""
    readme = code_identity.project_root() / "components" / step.name / "README.md"
    # Read once for all lines: this runs each time that the DAGs are parsed.
    return _LINK_TO_FILE.sub(r"\1", readme.read_text(encoding="utf-8")) if readme.is_file() else step.summary
