"""The tasks after a run's last step: tell people how it ended, and tell a server to load the new model.

They are tasks of Airflow and not steps, because the connections are there; `message_pod.py` says where they run. Each
is a teardown: it runs however the run ended, and its own failure never changes the run's state. It is tried again with
a growing delay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from qlora_retrain.core import graph
from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.errors import Problem, TryAgain
from qlora_retrain.runtimes.airflow.dag_run import own_run_id, plan_uri, store_root

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.notify import HookConfig, NotifyConfig

Result = TypeVar("Result")
# Under this key the task that moved an alias leaves the alias's name.
MOVED_ALIAS = "moved_alias"
# 5 tries within some five minutes. The run counts as running for so long, and the line's next one waits.
_RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=2),
    "execution_timeout": timedelta(minutes=2),
}


@dataclass(frozen=True, slots=True)
class AliasMove:
    """That `production` of a line names another version.

    Attributes:
        root: The store.
        line: The line.
        version: The version that it names now.
        run: The run that moved it.
    """

    root: str
    line: str
    version: str
    run: str

    @property
    def id(self) -> str:
        """The event's id: the same at every try, another for every other move."""
        text = "\0".join((self.root, self.line, self.version, self.run))
        return f"evt_{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def as_json(self) -> dict[str, Any]:
        """Return the body of the request, without its time."""
        data = {"line": self.line, "alias": PRODUCTION, "version": self.version, "run": self.run}
        return {"type": "alias.moved", "data": data}


class NotifyOperator(BaseOperator):  # type: ignore[misc]
    """Tell people how the run ended, if it ended in one of the ways that they asked for.

    Args:
        entry: The entry of `platform.yaml`.
        line: The line.
        pause_after: After so many failed runs in a row Airflow pauses the line; None: never.
    """

    template_fields: Sequence[str] = ()

    def __init__(self, *, entry: NotifyConfig, line: str, pause_after: int | None = None, **kwargs: Any) -> None:
        super().__init__(**{**_RETRIES, **kwargs})
        self.entry, self.line, self.pause_after = entry, line, pause_after

    def execute(self, context: Context) -> None:
        """Send the message."""
        from qlora_retrain.runtimes.airflow import delivery, run_message

        message = _try_to(lambda: run_message.of_run(context, self.line, self.pause_after))
        if message is None or message.event not in self.entry.events:
            raise AirflowSkipException(f"{message.event if message else 'unchanged'}: nobody asked to be told")
        _try_to(lambda: delivery.deliver(self.entry.kind, self.entry.connection, message, self.entry.to))
        self.log.info("%s by %s: %s", message.event, self.entry.connection, message.sentence)


class ReloadHookOperator(BaseOperator):  # type: ignore[misc]
    """Tell a server that `production` of the line names another version, if the run moved it.

    Args:
        entry: The entry of `platform.yaml`.
        line: The line.
    """

    template_fields: Sequence[str] = ()

    def __init__(self, *, entry: HookConfig, line: str, **kwargs: Any) -> None:
        super().__init__(**{**_RETRIES, **kwargs})
        self.entry, self.line = entry, line

    def move(self, context: Context) -> AliasMove | None:
        """Return how the run moved `production`; None where it did not."""
        from qlora_retrain.pipeline import status
        from qlora_retrain.pipeline.plan import Plan

        # A run that failed before its plan was made has left none.
        if not context["ti"].xcom_pull(task_ids=graph.PLAN_TASK):
            return None
        plan = Plan.load(plan_uri(context))
        numbers = status.numbers(plan, graph.producer_name("release"))
        if plan.unchanged or not numbers.get("moved") or numbers.get("promoted_to") != PRODUCTION:
            return None
        # Not the DAG run's own id: another may finish this plan, and it would tell of the same move.
        return AliasMove(plan.root, plan.line, str(numbers["version"]), plan.run_id)

    def execute(self, context: Context) -> None:
        """Send the request."""
        from qlora_retrain.runtimes.airflow import delivery

        def send() -> AliasMove | None:
            move = self.move(context)
            if move is not None:
                delivery.post_json(self.entry.connection, move.as_json(), move.id, must_sign=True)
            return move

        move = _try_to(send)
        if move is None:
            raise AirflowSkipException(f"this run did not move {PRODUCTION}")
        self.log.info("%s was told to load %s", self.entry.connection, move.version)


class MoveHooksOperator(BaseOperator):  # type: ignore[misc]
    """Tell the servers of a line that a person moved `production`; for the DAGs that move an alias of any line."""

    template_fields: Sequence[str] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**_RETRIES, **kwargs})

    def execute(self, context: Context) -> None:
        """Send the request to each server; where one fails, the others are told all the same."""
        from qlora_retrain.config import platform

        line = context["params"]["line"]
        hooks = platform.load().hooks_of(line)
        moved_alias = context["ti"].xcom_pull(task_ids=next(iter(self.upstream_task_ids)), key=MOVED_ALIAS)
        if moved_alias != PRODUCTION or not hooks:
            raise AirflowSkipException(f"{PRODUCTION} did not move" if hooks else f"no server loads {line}")

        failures = [failure for hook in hooks if (failure := self._tell(hook, line, context)) is not None]
        if failures:
            raise _as_airflow_error(failures[0]) from None

    def _tell(self, hook: HookConfig, line: str, context: Context) -> Problem | None:
        from qlora_retrain.runtimes.airflow import delivery
        from qlora_retrain.storage import moves, open_store

        try:
            # What it names now: another move may have followed, and has its own event.
            version = moves.describe_current(open_store(store_root()), line, PRODUCTION)
            move = AliasMove(store_root(), line, version, own_run_id(context))
            delivery.post_json(hook.connection, move.as_json(), move.id, must_sign=True)
        except Problem as problem:
            self.log.warning("%s", problem)
            return problem
        self.log.info("%s was told to load %s", hook.connection, version)
        return None


def _try_to(act: Callable[[], Result]) -> Result:
    """Call `act`; let Airflow try it again only where that may help."""
    try:
        return act()
    except Problem as problem:
        raise _as_airflow_error(problem) from None


def _as_airflow_error(problem: Problem) -> AirflowException:
    return (AirflowException if isinstance(problem, TryAgain) else AirflowFailException)(str(problem))
