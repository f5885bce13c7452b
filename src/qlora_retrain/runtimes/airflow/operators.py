"""What every Airflow runtime of this project shares: the plan as task 0, and a step that looks before it runs.

`PlanOperator` writes the run's plan. `StepOperator` looks for the step's artifact and, where there is none, has its
subclass run `python -m components.<step> --plan URI` somewhere, then judges by the artifact's manifest.

Every task computes the plan's URI from the run itself, so nothing travels by XCom and a cleared run keeps its plan.
Exit codes end a task as `errors.py` says: retried within the step's retries, or failed now with the step's last line.

Environment: `QLORA_RETRAIN_ROOT`, the store's URI; without it `.state/store` in the project's folder.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import Asset, AssetAlias, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from qlora_retrain.core import errors, graph
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes.airflow import params

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

ROOT_VARIABLE = "QLORA_RETRAIN_ROOT"
_REASON_LINES = 3

# Airflow's default is five minutes; "try again" here is preemption, throttling or a moved champion.
_BACKOFF: dict[str, Any] = {
    "retry_delay": timedelta(seconds=5),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=5),
}


def store_root() -> str:
    """The store's URI: the environment's, or the project's own folder."""
    return os.environ.get(ROOT_VARIABLE) or (code_identity.project_root() / ".state" / "store").as_uri()


def run_name(context: Context) -> str:
    """The run's name in the store; the same for every task and every try of a DAG run.

    `run_after` is there for every run, also one that an asset started, which has no logical date.
    """
    from qlora_retrain.pipeline import plan

    dag_run = context["dag_run"]
    return plan.run_id(dag_run.run_after, dag_run.dag_id, dag_run.run_id)


def plan_uri(context: Context) -> str:
    """Where the plan of this DAG run is, or the one that its form names."""
    from qlora_retrain.pipeline import plan

    given = context["params"].get(params.PLAN_URI)
    return str(given) if given else plan.plan_uri(store_root(), run_name(context))


class PlanOperator(BaseOperator):  # type: ignore[misc]
    """Task 0: resolve everything into the run's plan, or check the plan that the form names.

    Args:
        config_path: The line's YAML.
    """

    # A plan reads sources and the store: throttling passes, everything else fails at once by its exit code.
    def __init__(self, *, config_path: Path | str, **kwargs: Any) -> None:
        super().__init__(**{"retries": 2, **_BACKOFF, **kwargs})
        self.config_path = str(config_path)

    def execute(self, context: Context) -> None:
        """Write or check the plan; the log says what will run and why."""
        from qlora_retrain.pipeline import explain

        try:
            plan = self._plan(context)
        except Problem as problem:
            fail(problem.exit_code, str(problem))
        for line in explain.as_text(plan).splitlines():
            self.log.info("%s", line)

    def _plan(self, context: Context) -> Plan:
        from qlora_retrain.config.line import load
        from qlora_retrain.pipeline import plan

        config = load(Path(self.config_path), [])
        if context["params"].get(params.PLAN_URI):
            found = plan.Plan.load(plan_uri(context))
            if found.line != config.line:
                raise UsageError(f"{found.uri}: is a plan of line {found.line}; trigger that DAG, not {config.line}")
            return found
        turned = params.overrides(config, context["params"])
        for item in turned:
            self.log.info("changed by hand: %s", item)
        return plan.make(Path(self.config_path), store_root(), run_id=run_name(context), overrides=turned)


class BrokenLineOperator(BaseOperator):  # type: ignore[misc]
    """Stands in for a line whose YAML cannot be used: fails with the file's errors.

    Args:
        why: The errors, one a line.
    """

    def __init__(self, *, why: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.why = why

    def execute(self, context: Context) -> None:
        """Fail, and say why."""
        fail(errors.Exit.USAGE, self.why)


class StepOperator(BaseOperator):  # type: ignore[misc]
    """One step of the graph; a subclass says where it runs.

    Args:
        step: The step's name.
        line: The line, which names the asset alias that `publish` reports new versions to.
    """

    def __init__(self, *, step: str, line: str, **kwargs: Any) -> None:
        outlets = [AssetAlias(line)] if graph.step(step).store else []
        super().__init__(**{"retries": graph.step(step).retries, "outlets": outlets, **_BACKOFF, **kwargs})
        self.step = step
        self.line = line

    def run_step(self, plan: Plan, context: Context) -> None:
        """Run the step's one command line to its end; end the task with `fail` where that is not 0."""
        raise NotImplementedError

    def tidy(self, plan: Plan) -> None:
        """Remove what an earlier try left, now that the artifact is made."""

    def execute(self, context: Context) -> None:
        """Return at once where the artifact is made; otherwise make it."""
        from qlora_retrain.pipeline import execute as runner
        from qlora_retrain.pipeline.plan import Plan

        try:
            plan = Plan.load(plan_uri(context))
            found = runner.found(plan, self.step)
            if found is None:
                self.run_step(plan, context)
                self.judge(plan, context)
                return
            self.tidy(plan)
            if errors.refusal(found):
                fail(found, runner.refused_before(plan, self.step))
            else:
                self.log.info("%s", f"unchanged: {plan.unchanged}" if plan.unchanged else "made already")
                if context["ti"].try_number > 1:  # the first may have published, and died before it could tell
                    self._tell(plan, context)
        except Problem as problem:
            fail(problem.exit_code, str(problem))

    def judge(self, plan: Plan, context: Context) -> None:
        """What a step that ended well really made: the manifest's word counts, not the process's."""
        from qlora_retrain.pipeline import execute as runner

        if runner.found(plan, self.step) != errors.Exit.DONE:
            fail(errors.Exit.BUG, f"{self.step} ended well, but made no {graph.step(self.step).makes}")
        self._tell(plan, context)

    def last_lines(self, lines: Iterable[str]) -> str:
        """Copy the step's output to the task's log; return what the person on call should read of it."""

        def logged() -> Iterator[str]:
            for line in lines:
                self.log.info("%s", line.rstrip())
                yield line

        return self.reason_in(logged())

    def reason_in(self, lines: Iterable[str]) -> str:
        """What the person on call should read of a step's output: the line it ended with, else its last ones."""
        last: deque[str] = deque(maxlen=_REASON_LINES)
        for text in map(str.rstrip, lines):
            if text and not text.startswith('{"time"'):
                last.append(text)
        ending = [text for text in last if text.startswith(f"{self.step}: ")]
        return "\n".join(ending[-1:] or last)

    def _tell(self, plan: Plan, context: Context) -> None:
        """Emit the asset's event if there is a new version, or an alias moved."""
        from qlora_retrain.pipeline import execute as runner

        if not self.outlets or plan.unchanged:
            return
        numbers = runner.summary(plan, self.step)
        if numbers.get("published") or numbers.get("moved"):
            asset = Asset(f"{plan.root}/models/{plan.line}", group="model")
            extra: dict[str, Any] = {name: numbers.get(name) for name in ("version", "published", "moved")}
            context["outlet_events"][AssetAlias(self.line)].add(asset, extra=extra)


def fail(status: int, reason: str) -> NoReturn:
    """End the task as the exit code says; `reason` is what the person on call reads first."""
    ending = f"{errors.describe(status)} ({status})"
    message = reason if ending in reason else f"{ending}: {reason}".rstrip(": ")  # a runner's last line says it already
    if errors.may_retry(status):
        raise AirflowException(message)
    raise AirflowFailException(message)
