"""The last task of a line that asks for approval: start the DAG run that asks, and end.

The waiting is another DAG's, because a line has one run at a time: an answer that takes two days must not hold the next
run. One request stands for one version and one state of production, so a run that repeats another asks nobody again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, DagRunTriggerException

from qlora_retrain.core import graph
from qlora_retrain.core.aliases import PRODUCTION, STAGING
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.runtimes.airflow.dag_run import plan_uri, store_root
from qlora_retrain.runtimes.airflow.move_request import APPROVAL_DAG
from qlora_retrain.runtimes.airflow.operators import RETRY_BACKOFF, fail_task

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

REQUEST_TASK = "request_approval"


class RequestApprovalOperator(BaseOperator):  # type: ignore[misc]
    """Start the DAG run that asks about the version in staging.

    Args:
        line: The line.
    """

    template_fields: Sequence[str] = ()

    def __init__(self, *, line: str, **kwargs: Any) -> None:
        defaults = {
            "task_id": REQUEST_TASK,
            "task_display_name": "Ask for approval",
            "retries": 2,
            "execution_timeout": timedelta(minutes=30),
        }
        super().__init__(**{**defaults, **RETRY_BACKOFF, **kwargs})
        self.line = line

    def execute(self, context: Context) -> None:
        """Start it, unless the run has nothing to ask about."""
        from qlora_retrain.pipeline.plan import Plan

        try:
            plan = Plan.load(plan_uri(context))
            plan.refuse_other(line=self.line, root=store_root())
            version, generation = self._asked_about(plan)
        except Problem as problem:
            fail_task(context, Ending.from_problem(REQUEST_TASK, problem))
        current = plan.champion.version if plan.champion else "none"
        # Airflow starts it for the user who started this run, and skips this task where the run exists already.
        raise DagRunTriggerException(
            trigger_dag_id=APPROVAL_DAG,
            dag_run_id=f"{self.line}__{version}__{generation}",
            conf={"line": self.line, "version": version, "from_version": current},
            logical_date=None,
            reset_dag_run=False,
            skip_when_already_exists=True,
            wait_for_completion=False,
            allowed_states=[],
            failed_states=[],
            poke_interval=0,
            deferrable=False,
        )

    def _asked_about(self, plan: Plan) -> tuple[str, int]:
        """Return the version in staging, and how often production has moved.

        Raises:
            UsageError: If production has moved since the plan was made.
        """
        from qlora_retrain.pipeline import status
        from qlora_retrain.storage import open_store, registry

        numbers = status.numbers(plan, graph.producer_name("release"))
        if plan.unchanged or numbers.get("promoted_to") != STAGING:
            raise AirflowSkipException("nothing to approve: this run has moved no alias but latest")
        state, _ = registry.read_alias(open_store(plan.root), plan.line, PRODUCTION)
        actual, champion = state.version if state else None, plan.champion.version if plan.champion else None
        if actual == numbers["version"]:
            raise AirflowSkipException(f"nothing to approve: production names {actual} already")
        if state is not None and actual != champion:
            raise UsageError(
                f"{plan.line}@{PRODUCTION}: the verdict compared with {champion or 'none'}, and it names {actual} now, "
                f"moved by {state.actor} at {state.at} ({state.reason}); run the line again"
            )
        return str(numbers["version"]), state.generation if state else 0
