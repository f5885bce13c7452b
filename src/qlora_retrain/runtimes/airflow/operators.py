"""The operators that every Airflow runtime shares: the plan as task 0, and a step that runs only if it has to.

`PlanOperator` writes the run's plan. `StepOperator` looks for the step's artifact. Where there is none, its subclass
runs `python -m components.<step> --plan URI` somewhere; then the artifact's manifest decides whether that succeeded.

The plan's URI, with the hash of the plan, reaches the steps as the XCom of task 0: whoever can write below `runs/` can
change a plan there, and then every step refuses it. A cleared run keeps its plan. The step's ending decides whether a
failed task is retried within the step's retries or fails at once. The ending is the message of the failure, and it is
saved in the run's folder.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import Asset, AssetAlias, BaseOperator
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    AirflowTaskTimeout,
)

from qlora_retrain.core import endings, errors, graph, progress
from qlora_retrain.core.arguments import ANY_ALIAS
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow import params
from qlora_retrain.runtimes.airflow.dag_run import (
    is_of_lab,
    is_started_by_schedule,
    own_run_id,
    plan_run_id,
    plan_uri,
    publish_arguments,
    store_root,
)

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

_LAST_LINES = 3

# Airflow's default delay is five minutes; "try again" here means preemption, throttling or a moved champion.
_BACKOFF: dict[str, Any] = {
    "retry_delay": timedelta(seconds=5),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=5),
}


class PlanOperator(BaseOperator):  # type: ignore[misc]
    """Task 0: resolve everything into the run's plan, or check the plan that the form names.

    Args:
        config_path: The line's YAML.
    """

    def __init__(self, *, config_path: Path | str, **kwargs: Any) -> None:
        timeout = deadlines.task_timeout(graph.PLAN_TASK)
        # Retries help only while a source or the store is throttled; every other error fails the task at once.
        super().__init__(**{"retries": 2, "execution_timeout": timeout, **_BACKOFF, **kwargs})
        self.config_path = str(config_path)

    def execute(self, context: Context) -> str:
        """Write or check the plan, and log what will run and why; return its URI, which Airflow keeps as an XCom."""
        # Imported here and below, because the DAG processor imports this module every time that it parses the DAGs.
        from qlora_retrain.pipeline import explain

        try:
            plan = self._make_or_load_plan(context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(graph.PLAN_TASK, problem))
        except AirflowTaskTimeout:
            fail_task(context, deadlines.ending(graph.PLAN_TASK, self.execution_timeout))
        for line in explain.as_text(plan).split("\n"):
            self.log.info("%s", line)
        return plan.uri

    def _make_or_load_plan(self, context: Context) -> Plan:
        from qlora_retrain.config.line import load
        from qlora_retrain.pipeline import explain
        from qlora_retrain.pipeline.make_plan import find_plan, make_plan
        from qlora_retrain.storage import open_store

        # Read again for each run: the DAG file was parsed by another process, perhaps before the YAML changed.
        config = load(Path(self.config_path), [])
        if context["params"].get(params.RESUME_RUN):
            resumed = find_plan(open_store(store_root()), plan_run_id(context))
            if resumed.line != config.line:
                raise UsageError(f"run {resumed.run_id} is of line {resumed.line}; trigger that DAG, not {config.line}")
            params.refuse_other_judgement(resumed.run_id, explain.setting_changes(resumed, config))
            return resumed

        overrides = params.overrides(config, context["params"])
        for override in overrides:
            self.log.info("changed by hand: %s", override)
        return make_plan(
            Path(self.config_path),
            store_root(),
            run=own_run_id(context),
            overrides=overrides,
            is_started_by_schedule=is_started_by_schedule(context),
        )


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
        super().__init__(**{"execution_timeout": timedelta(minutes=5), **kwargs})
        self.reason = reason

    def execute(self, context: Context) -> None:
        """Fail with the reason."""
        fail_task(context, Ending.from_exit_code(graph.PLAN_TASK, errors.Exit.USAGE, self.reason))


class StepOperator(BaseOperator):  # type: ignore[misc]
    """One step of the graph; a subclass decides where it runs.

    Args:
        step: The step's name.
        line: The line, which names the asset alias that `publish` reports new versions to.
        alias: The one alias of the line that `publish` may move, whatever the plan says; None: no alias; `*`: any.
        plans_key: In a lab, the key of the XCom with the plans of this task; None: the DAG run has one plan.
    """

    # What a line's author writes, such as an image's name, is never rendered: `{{ conn... }}` would show a secret.
    template_fields: Sequence[str] = ()

    def __init__(
        self, *, step: str, line: str, alias: str | None = ANY_ALIAS, plans_key: str | None = None, **kwargs: Any
    ) -> None:
        # An alias and not an asset, because the asset's URI has the store, which is known only when the task runs.
        outlets = [AssetAlias(line)] if graph.step(step).kind == graph.StepKind.PUBLISH else []
        defaults = {"retries": graph.step(step).retries, "execution_timeout": deadlines.task_timeout(step)}
        super().__init__(**{**defaults, "outlets": outlets, **_BACKOFF, **kwargs})
        self.step = step
        self.line = line
        self.alias = alias
        self.plans_key = plans_key
        # Further arguments of the step's command line; `execute` sets them.
        self.step_arguments: list[str] = []

    def pre_execute(self, context: Context) -> None:
        """Give this try the time that the run's plan says, whose budget may differ from the line's."""
        from qlora_retrain.pipeline.plan import Plan

        # Airflow reads the timeout after this and before `execute`, which reports whatever is wrong with the plan.
        with contextlib.suppress(Problem):
            self.execution_timeout: timedelta = deadlines.planned_timeout(
                Plan.load(plan_uri(context)), self.step, self.execution_timeout
            )

    def stop_step(self) -> None:
        """Stop what `run_step` started, and wait until it has saved its work; called at the deadline."""

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
            # Task 0 made the plan, and what this task was made for is not taken from it.
            plan.refuse_other(line=self.line, root=store_root(), alias=self.alias)
            self.step_arguments = ["--line", self.line, "--root", plan.root]
            if graph.step(self.step).kind == graph.StepKind.PUBLISH:
                self.step_arguments += ["--alias", self.alias or "", *publish_arguments(context)]
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
                self.log.info("%s", status.nothing_to_do(plan) or "made already")
                # The first try may have published and then died before it emitted the event.
                if context["ti"].try_number > 1:
                    self._emit_asset_event(plan, context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(self.step, problem))
        # Airflow itself would try it again.
        except AirflowTaskTimeout:
            self.stop_step()
            fail_task(context, deadlines.ending(self.step, self.execution_timeout))

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
        AirflowSkipException: For a point of a lab that is measured and refused, which is no failure there.
    """
    from qlora_retrain.pipeline import run_endings

    # Task 0 fails for a mistyped run, or one of another line; nothing may be written there.
    run_id = own_run_id(context) if ending.step == graph.PLAN_TASK else plan_run_id(context)
    run_endings.write_to_store(store_root(), run_id, ending)
    if is_of_lab(context) and ending.code == errors.Exit.QUALITY_REFUSED:
        raise AirflowSkipException(ending.summary()) from None
    # From none: Airflow logs what an exception came from too, and a library's own message may hold a URL's password.
    if ending.retry and not is_last_try:
        raise AirflowException(ending.summary()) from None
    raise AirflowFailException(ending.summary()) from None
