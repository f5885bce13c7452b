"""The operators that every Airflow runtime shares: the plan as task 0, and a step that runs only if it has to.

`PlanOperator` writes the run's plan. `StepOperator` looks for the step's artifact. Where there is none, its subclass
runs `python -m components.<step> --plan URI` somewhere; then the artifact's manifest decides whether that succeeded.

The plan's URI, with the hash of the plan, reaches the steps as the XCom of task 0: whoever can write below `runs/` can
change a plan there, and then every step refuses it. A cleared run keeps its plan. The step's ending decides whether a
failed task is retried within the step's retries or fails at once. The ending is the message of the failure, and it is
saved in the run's folder.

Environment: `QLORA_RETRAIN_ROOT`, the store's URI; without it, `.state/store` in the project's folder.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from airflow.sdk import Asset, AssetAlias, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from qlora_retrain.core import endings, errors, graph, progress
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes.airflow import params

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

ROOT_VARIABLE = "QLORA_RETRAIN_ROOT"
_LAST_LINES = 3

# Airflow's default delay is five minutes; "try again" here means preemption, throttling or a moved champion.
_BACKOFF: dict[str, Any] = {
    "retry_delay": timedelta(seconds=5),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=5),
}


def store_root() -> str:
    """Return the store's URI: the environment's, or the project's own folder."""
    return os.environ.get(ROOT_VARIABLE) or (code_identity.project_root() / ".state" / "store").as_uri()


def own_run_id(context: Context) -> str:
    """Return the DAG run's own id in the store; it is the same for every task and every try.

    It is made from `run_after`, which every DAG run has. A run that an asset started has no logical date.
    """
    from qlora_retrain.pipeline import plan

    # `run_after` and both ids stay the same when tasks are cleared, so a cleared run finds its plan.
    dag_run = context["dag_run"]
    return plan.run_id(dag_run.run_after, dag_run.dag_id, dag_run.run_id)


def plan_run_id(context: Context) -> str:
    """Return the id of the run whose plan the steps run by: the DAG run's own, or the one that its form names."""
    return str(context["params"].get(params.RESUME_RUN) or own_run_id(context))


def plan_uri(context: Context) -> str:
    """Return the URI of the plan, with its hash, as task 0 of this DAG run returned it.

    Raises:
        UsageError: If task 0 has left none.
    """
    uri = context["ti"].xcom_pull(task_ids=graph.PLAN_TASK)
    if not uri:
        raise UsageError(f"task {graph.PLAN_TASK} of this run has left no plan; clear that task, and the run goes on")
    return str(uri)


def publish_arguments(context: Context) -> list[str]:
    """Return what Airflow says of a run's start, for the audit trail: the user whom its API authenticated.

    Nothing of it comes from the run's form or its `conf`, which whoever triggers a run writes.
    """
    dag_run = context["dag_run"]
    if user := getattr(dag_run, "triggering_user_name", None):
        return ["--triggered-by", f"airflow:{quote(user, safe='@+')}"]
    # Nobody: a schedule or an asset. Another system's name, so that no user can be called so.
    run_type = getattr(dag_run, "run_type", "unknown")
    return ["--triggered-by", f"airflow-run:{getattr(run_type, 'value', run_type)}"]


class PlanOperator(BaseOperator):  # type: ignore[misc]
    """Task 0: resolve everything into the run's plan, or check the plan that the form names.

    Args:
        config_path: The line's YAML.
    """

    def __init__(self, *, config_path: Path | str, **kwargs: Any) -> None:
        # Retries help only while a source or the store is throttled; every other error fails the task at once.
        super().__init__(**{"retries": 2, **_BACKOFF, **kwargs})
        self.config_path = str(config_path)

    def execute(self, context: Context) -> str:
        """Write or check the plan, and log what will run and why; return its URI, which Airflow keeps as an XCom."""
        # Imported here and below, because the DAG processor imports this module every time that it parses the DAGs.
        from qlora_retrain.pipeline import explain

        try:
            plan = self._make_or_load_plan(context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(graph.PLAN_TASK, problem))
        for line in explain.as_text(plan).split("\n"):
            self.log.info("%s", line)
        return plan.uri

    def _make_or_load_plan(self, context: Context) -> Plan:
        from qlora_retrain.config.line import load
        from qlora_retrain.pipeline.make_plan import find_plan, make_plan
        from qlora_retrain.storage import open_store

        # Read again for each run: the DAG file was parsed by another process, perhaps before the YAML changed.
        config = load(Path(self.config_path), [])
        if context["params"].get(params.RESUME_RUN):
            resumed = find_plan(open_store(store_root()), plan_run_id(context))
            if resumed.line != config.line:
                raise UsageError(f"run {resumed.run_id} is of line {resumed.line}; trigger that DAG, not {config.line}")
            return resumed

        overrides = params.overrides(config, context["params"])
        for override in overrides:
            self.log.info("changed by hand: %s", override)
        return make_plan(Path(self.config_path), store_root(), run=own_run_id(context), overrides=overrides)


@dataclass(frozen=True)
class StepOutput:
    """What a step's output says about its end.

    Attributes:
        ending: The ending that the step wrote; None where it was killed before.
        last_lines: The last lines of its other output, for a person.
    """

    ending: Ending | None
    last_lines: str


class BrokenLineOperator(BaseOperator):  # type: ignore[misc]
    """Stand in for a line whose YAML cannot be used: fail with the file's errors.

    Args:
        reason: The errors, one a line.
    """

    def __init__(self, *, reason: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reason = reason

    def execute(self, context: Context) -> None:
        """Fail with the reason."""
        fail_task(context, Ending.from_exit_code(graph.PLAN_TASK, errors.Exit.USAGE, self.reason))


class StepOperator(BaseOperator):  # type: ignore[misc]
    """One step of the graph; a subclass decides where it runs.

    Args:
        step: The step's name.
        line: The line, which names the asset alias that `publish` reports new versions to.
    """

    # What a line's author writes, such as an image's name, is never rendered: `{{ conn... }}` would show a secret.
    template_fields: Sequence[str] = ()

    def __init__(self, *, step: str, line: str, **kwargs: Any) -> None:
        # An alias and not an asset, because the asset's URI has the store, which is known only when the task runs.
        outlets = [AssetAlias(line)] if graph.step(step).kind == graph.StepKind.PUBLISH else []
        super().__init__(**{"retries": graph.step(step).retries, "outlets": outlets, **_BACKOFF, **kwargs})
        self.step = step
        self.line = line
        # Further arguments of the step's command line; `execute` sets them.
        self.step_arguments: list[str] = []

    def run_step(self, plan: Plan, context: Context) -> None:
        """Run the step's one command line to its end; call `fail_task` unless its exit code is 0."""
        raise NotImplementedError

    def remove_leftovers(self, plan: Plan) -> None:
        """Remove the container or pod of an earlier try; called when the artifact is complete already."""

    def execute(self, context: Context) -> None:
        """Return at once where the artifact is complete; otherwise run the step."""
        from qlora_retrain.pipeline import status
        from qlora_retrain.pipeline.plan import Plan

        try:
            plan = Plan.load(plan_uri(context))
            if graph.step(self.step).kind == graph.StepKind.PUBLISH:
                self.step_arguments = publish_arguments(context)
            exit_code = status.exit_code(plan, self.step)
            self._clear_earlier_ending(plan)
            if exit_code is None:
                self.run_step(plan, context)
                self.check_artifact(plan, context)
                return

            self.remove_leftovers(plan)
            if errors.is_refusal(exit_code):
                fail_task(context, status.earlier_refusal(plan, self.step))
            else:
                self.log.info("%s", f"unchanged: {plan.unchanged}" if plan.unchanged else "made already")
                # The first try may have published and then died before it emitted the event.
                if context["ti"].try_number > 1:
                    self._emit_asset_event(plan, context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(self.step, problem))

    def _clear_earlier_ending(self, plan: Plan) -> None:
        """Remove how an earlier try ended, now that another begins.

        The step does so itself when it begins. That is late for a pod that waits for a node. It never happens where
        this try follows a container that runs already, or where the earlier one was stopped with its artifact complete.
        """
        from qlora_retrain.pipeline import run_endings
        from qlora_retrain.storage import open_store

        store = open_store(plan.root)
        earlier = run_endings.read(store, plan.run_id, self.step)
        if earlier is not None and earlier.code != errors.Exit.DONE:
            run_endings.clear(store, plan.run_id, self.step)

    def check_artifact(self, plan: Plan, context: Context) -> None:
        """Fail unless the artifact's manifest says that the step succeeded; its exit code alone is no proof."""
        from qlora_retrain.pipeline import status

        if status.exit_code(plan, self.step) != errors.Exit.DONE:
            reason = f"{self.step} exited with 0, but its {graph.step(self.step).makes} is not in the store"
            fail_task(context, Ending.from_exit_code(self.step, errors.Exit.BUG, reason))
        self._emit_asset_event(plan, context)

    def copy_output(self, lines: Iterable[str]) -> StepOutput:
        """Copy the step's output to the task's log, except the ending; return the ending and the last lines."""
        ending, last = None, deque[str](maxlen=_LAST_LINES)
        for line in lines:
            text = line.rstrip()
            if step_ending := endings.from_line(text):
                ending = step_ending
                continue
            self.log.info("%s", text)
            # Progress would push out the lines that say what went wrong.
            if text and progress.parse_update(text) is None:
                last.append(text)
        return StepOutput(ending, "\n".join(last))

    def _emit_asset_event(self, plan: Plan, context: Context) -> None:
        """Emit the asset's event if a version was published or an alias moved, so that other DAGs can start on it."""
        from qlora_retrain.pipeline import status

        if not self.outlets or plan.unchanged:
            return

        numbers = status.numbers(plan, self.step)
        if numbers.get("published") or numbers.get("moved"):
            asset = Asset(f"{plan.root}/models/{plan.line}", group="model")
            extra: dict[str, Any] = {name: numbers.get(name) for name in ("version", "published", "moved")}
            context["outlet_events"][AssetAlias(self.line)].add(asset, extra=extra)


def fail_task(context: Context, ending: Ending, *, is_last_try: bool = False) -> NoReturn:
    """Fail the task as the ending says, and write the ending to the run's folder.

    Args:
        context: The task's context.
        ending: How the step, or the attempt to run it, ended. Its reason is what the person on call reads first.
        is_last_try: Do not let Airflow retry, whatever the ending says.

    Raises:
        AirflowException: For an ending that may be retried.
        AirflowFailException: For any other, so that Airflow does not retry.
    """
    from qlora_retrain.pipeline import run_endings

    # Task 0 fails for a mistyped run, or one of another line; nothing may be written there.
    run_id = own_run_id(context) if ending.step == graph.PLAN_TASK else plan_run_id(context)
    run_endings.write_to_store(store_root(), run_id, ending)
    if ending.retry and not is_last_try:
        raise AirflowException(ending.summary())
    raise AirflowFailException(ending.summary())
