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
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import AssetAlias, BaseOperator
from airflow.sdk.exceptions import (
    AirflowSkipException,
    AirflowTaskTimeout,
    DownstreamTasksSkipped,
)

from qlora_retrain.core import errors, graph
from qlora_retrain.core.arguments import ANY_ALIAS
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow import form_fields, lineage, links, params, step_log
from qlora_retrain.runtimes.airflow.dag_run import (
    is_started_by_schedule,
    own_run_id,
    plan_run_id,
    plan_uri,
    publish_arguments,
    push_note,
    store_root,
)
from qlora_retrain.runtimes.airflow.step_log import StepOutput as StepOutput  # the runtimes import it from here
from qlora_retrain.runtimes.airflow.task_failure import fail_task as fail_task

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

# Airflow's default delay is five minutes; "try again" here means preemption, throttling or a moved champion.
RETRY_BACKOFF: dict[str, Any] = {
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
        super().__init__(**{"retries": 2, "execution_timeout": timeout, **RETRY_BACKOFF, **kwargs})
        self.operator_extra_links = (links.RunLink(),)
        self.config_path = str(config_path)

    def execute(self, context: Context) -> str:
        """Write or check the plan, and log what will run and why; return its URI, which Airflow keeps as an XCom.

        A dry run writes no plan and skips every other task.
        """
        # Imported here and below, because the DAG processor imports this module every time that it parses the DAGs.
        from qlora_retrain.pipeline import explain, preview

        is_dry_run = form_fields.is_dry_run(context["params"])
        try:
            plan = self._make_or_load_plan(context)
            for line in explain.as_text(plan, is_preview=is_dry_run).split("\n"):
                self.log.info("%s", line)
            if is_dry_run:
                push_note(context, lambda: preview.note(plan))
        except Problem as problem:
            fail_task(context, Ending.from_problem(graph.PLAN_TASK, problem))
        except AirflowTaskTimeout:
            fail_task(context, deadlines.ending(graph.PLAN_TASK, self.execution_timeout))
        if is_dry_run:
            # All of them and not the next ones alone, because a task may be set to run after a skipped one.
            raise DownstreamTasksSkipped(tasks=sorted(self.get_flat_relative_ids(upstream=False)))
        return plan.uri

    def _make_or_load_plan(self, context: Context) -> Plan:
        from qlora_retrain.config.line import load
        from qlora_retrain.pipeline import explain
        from qlora_retrain.pipeline.make_plan import find_plan, make_plan
        from qlora_retrain.pipeline.preview import preview_plan
        from qlora_retrain.storage import open_store

        # Read again for each run: the DAG file was parsed by another process, perhaps before the YAML changed.
        config = load(Path(self.config_path), [])
        if context["params"].get(form_fields.RESUME_RUN):
            only_look = form_fields.is_dry_run(context["params"])
            resumed = find_plan(open_store(store_root()), plan_run_id(context), only_look=only_look)
            if resumed.line != config.line:
                raise UsageError(f"run {resumed.run_id} is of line {resumed.line}; trigger that DAG, not {config.line}")
            params.refuse_other_judgement(resumed.run_id, explain.setting_changes(resumed, config))
            return resumed

        overrides = params.overrides(config, context["params"])
        for override in overrides:
            self.log.info("changed by hand: %s", override)
        if form_fields.is_dry_run(context["params"]):
            return preview_plan(Path(self.config_path), store_root(), run=own_run_id(context), overrides=overrides)
        return make_plan(
            Path(self.config_path),
            store_root(),
            run=own_run_id(context),
            overrides=overrides,
            is_started_by_schedule=is_started_by_schedule(context),
        )


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
        super().__init__(**{**defaults, "outlets": outlets, **RETRY_BACKOFF, **kwargs})
        # The points of a lab share tasks, and its report has all of them.
        self.operator_extra_links = () if plans_key else links.links_of(step)
        self.step = step
        self.line = line
        self.alias = alias
        self.plans_key = plans_key
        # Further arguments of the step's command line; `execute` sets them.
        self.step_arguments: list[str] = []
        # The run's plan, once this process has read it.
        self.plan: Plan | None = None

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

        # Where somebody clears a task that task 0 has skipped.
        if form_fields.is_dry_run(context["params"]):
            raise AirflowSkipException("this run is a dry run; start another one to run the steps")
        try:
            self.plan = plan = Plan.load(plan_uri(context))
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
                self._note_result(plan, context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(self.step, problem))
        # Airflow itself would try it again.
        except AirflowTaskTimeout:
            self.stop_step()
            fail_task(context, deadlines.ending(self.step, self.execution_timeout))

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """Return what the step read and made; OpenLineage's provider calls this at the end, where it is installed."""
        return lineage.of_step(self.plan, self.step) if self.plan else None

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
        self._note_result(plan, context)

    def _note_result(self, plan: Plan, context: Context) -> None:
        """Leave the run's result for its note, once the last step is done."""
        from qlora_retrain.pipeline import run_summary

        if graph.step(self.step).kind == graph.StepKind.PUBLISH:
            push_note(context, lambda: run_summary.as_text(plan))

    def copy_output(self, lines: Iterable[str]) -> StepOutput:
        """Copy the step's output to the task's log; return its ending and its last lines."""
        return step_log.copy_output(lines, self.log)

    def _emit_asset_event(self, plan: Plan, context: Context) -> None:
        """Emit the asset's event if a version was published or an alias moved, so that other DAGs can start on it."""
        from qlora_retrain.pipeline import status

        if not self.outlets or plan.unchanged:
            return

        numbers = status.numbers(plan, self.step)
        if numbers.get("published") or numbers.get("moved"):
            extra = lineage.model_extra(plan, numbers)
            context["outlet_events"][AssetAlias(self.line)].add(lineage.model_asset(plan), extra=extra)
