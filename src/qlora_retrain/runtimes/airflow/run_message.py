"""How a run of a line ended, as a short message for people and programs: the verdict, two numbers and where to look.

Read from the states of the run's tasks and from what the run left in the store. No row's text and no secret is in it:
of a program that crashed, whose last output may hold anything, only the kind of end is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qlora_retrain.core import endings, graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Problem, describe
from qlora_retrain.runtimes.airflow.dag_run import own_run_id, plan_run_id, plan_uri, store_root

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.notify import Event
    from qlora_retrain.core.outcome import Number
    from qlora_retrain.pipeline.plan import Plan

_MAX_SENTENCE_CHARACTERS = 500
_TASKS = (graph.PLAN_TASK, *(step.name for step in graph.STEPS))
# Of these causes the reason is a sentence of ours; of any other it may be what a program printed last.
_EXPLAINED = (
    Cause.DATA_REFUSED, Cause.QUALITY_REFUSED, Cause.INPUT_REFUSED, Cause.USAGE, Cause.INTEGRITY, Cause.DIVERGED,
    Cause.THROTTLED, Cause.INPUT_MISSING, Cause.TIME_BUDGET, Cause.CONFLICT, Cause.NODE_LOST, Cause.NOT_STARTED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunMessage:
    """What is told about a run.

    Attributes:
        event: How it ended.
        line: The line.
        run: The run's id in Airflow.
        sentence: The verdict, or the first line of the reason.
        version: The version that it published; None where it published none.
        numbers: The primary metric of the challenger, and of the champion or else of the base.
        links: By name: the run's page in Airflow, its folder in the store, its report.
    """

    event: Event
    line: str
    run: str
    sentence: str
    version: str | None = None
    numbers: Mapping[str, Number] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """An id by which a receiver knows a message that it got twice; another end of the same run has another."""
        text = "\0".join((self.event, self.line, self.run, self.sentence))
        return f"msg_{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def as_json(self) -> dict[str, Any]:
        """Return the body of a webhook, without its time."""
        return {"type": f"run.{self.event}", "data": {k: v for k, v in asdict(self).items() if k != "event"}}

    def subject(self) -> str:
        """Return one short line."""
        return f"{self.line}: {self.event}" + (f" ({self.version})" if self.version else "")

    def text(self) -> str:
        """Return some lines of plain text."""
        numbers = [
            f"{n}: {value:.4g}" if isinstance(value, float) else f"{n}: {value}" for n, value in self.numbers.items()
        ]
        links = [f"{name}: {address}" for name, address in self.links.items()]
        return "\n".join((self.sentence, "", *numbers, *links, f"run: {self.run}"))


def of_run(context: Context, line: str, pause_after: int | None = None) -> RunMessage | None:
    """Return the message about the run of a task that runs after all others; None where there is nothing to tell.

    Args:
        context: The task's context.
        line: The line.
        pause_after: After so many failed runs in a row Airflow pauses the line.

    Raises:
        Problem: If the store cannot say whether a run that succeeded has published.
    """
    dag_run = context["dag_run"]
    states = context["ti"].get_task_states(dag_id=dag_run.dag_id, run_ids=[dag_run.run_id])[dag_run.run_id]
    stopped_at = _stopped_at(states)
    # Where the plan failed, the run that a form names may be none.
    run_id = own_run_id(context) if stopped_at == graph.PLAN_TASK else plan_run_id(context)
    links = {**_airflow_link(dag_run.dag_id, dag_run.run_id), "store": f"{store_root()}/runs/{run_id}"}
    common: dict[str, Any] = {"line": line, "run": dag_run.run_id, "links": links}
    if stopped_at is None:
        return _of_success(context, common)
    try:
        return _of_failure(context, stopped_at, run_id, common, pause_after)
    # A store that does not answer must not keep the message back.
    except Problem as problem:
        sentence = f"{stopped_at}: failed, and the store cannot say why: {_first_line(str(problem))}"
        return RunMessage("failure", sentence=sentence, **common)


def _stopped_at(states: Mapping[str, str | None]) -> str | None:
    """Return the task that stopped a run: the first that failed, else the first that did not run; None: none did."""
    incomplete = [task for task in _TASKS if states.get(task, "success") != "success"]
    failed = [task for task in incomplete if states[task] == "failed"]
    return next(iter([*failed, *incomplete]), None)


def of_deadline(dag_run: Mapping[str, Any], line: str, deadline: str) -> RunMessage:
    """Return the message about a run that has not ended by its deadline.

    Args:
        dag_run: The run as Airflow's REST API describes it.
        line: The line.
        deadline: When it should have ended.
    """
    run = str(dag_run["dag_run_id"])
    sentence = f"the run has not ended by its deadline, {deadline}; it goes on, and its tasks stop at their own"
    if dag_run["state"] == "failed":
        sentence = f"the run was stopped at its deadline, {deadline}; its logs say how far it came"
    links = _airflow_link(str(dag_run["dag_id"]), run)
    return RunMessage("deadline", line=line, run=run, sentence=sentence, links=links)


def _of_failure(
    context: Context, task: str, run_id: str, common: dict[str, Any], pause_after: int | None
) -> RunMessage:
    from qlora_retrain.pipeline import run_endings
    from qlora_retrain.storage import open_store

    ending = run_endings.read(open_store(store_root()), run_id, task)
    if ending is None or ending.kind == endings.Kind.DONE:
        sentence = f"{task}: stopped without a reason, for instance by hand or with its machine; see the task's log"
        ending = None
    else:
        sentence = _sentence(ending)
    is_refused = ending is not None and ending.kind == endings.Kind.REFUSED
    if pause_after is not None:
        sentence += f" (the line is paused after {pause_after} failed runs in a row)"
    plan = None if task == graph.PLAN_TASK else _plan(context)
    return RunMessage(
        "refused" if is_refused else "failure",
        sentence=sentence,
        numbers=two_numbers(plan) if plan and is_refused else {},
        **common,
    )


def _of_success(context: Context, common: dict[str, Any]) -> RunMessage | None:
    from qlora_retrain.pipeline import run_page, status

    plan = _plan(context)
    numbers = status.numbers(plan, graph.producer_name("release"))
    if plan.unchanged or not (numbers.get("published") or numbers.get("moved")):
        return None
    version = str(numbers["version"])
    return RunMessage(
        "published", sentence=run_page.sentence(plan), version=version, numbers=two_numbers(plan), **common
    )


def two_numbers(plan: Plan) -> dict[str, Number]:
    """Return the primary metric of the challenger, and beside it that of the champion, or else of the base."""
    from qlora_retrain.pipeline import status

    step = graph.producer_name("evaluation")
    numbers = status.numbers(plan, step)
    metric = plan.step(step).config.get("primary_metric")
    if metric is None:
        # As the evaluation chooses: accuracy where answers are labels, loss otherwise.
        metric = "loss" if numbers.get("accuracy_challenger") is None else "accuracy"
    rival = "champion" if numbers.get(f"{metric}_champion") is not None else "base"
    names = [f"{metric}_{contestant}" for contestant in ("challenger", rival)]
    return {name: numbers[name] for name in names if numbers.get(name) is not None}


def _plan(context: Context) -> Plan:
    from qlora_retrain.pipeline.plan import Plan

    return Plan.load(plan_uri(context))


def _sentence(ending: Ending) -> str:
    """Return the step, the kind of end, and the first line of a reason that one of our own errors gave."""
    if ending.cause not in _EXPLAINED:
        return f"{ending.step}: {describe(ending.code)} ({ending.code}); see the task's log"
    return _first_line(ending.sentence())


def _first_line(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= _MAX_SENTENCE_CHARACTERS else f"{line[:_MAX_SENTENCE_CHARACTERS]} ..."


def _airflow_link(dag_id: str, run_id: str) -> dict[str, str]:
    from airflow.sdk.configuration import conf

    # Without the address of the UI, which a default would get wrong, there is no link.
    base = conf.get("api", "base_url", fallback="")
    return {"airflow": f"{base.rstrip('/')}/dags/{quote(dag_id)}/runs/{quote(run_id, safe='')}"} if base else {}
