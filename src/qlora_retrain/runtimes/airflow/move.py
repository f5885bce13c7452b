"""The task of `qlora-retrain-move`: make the move that the form asks for, as `publish` of that line would make one.

The form was filled in by the user whom Airflow's API authenticated. That name goes into the audit trail with the reason
and the DAG run. Where a line asks for approval, an approver alone may promote, and nobody what their own run published.
A rollback asks nobody: it goes back to what was in production before, and it must be quick.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import Asset, AssetAlias, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout

from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.runtimes.airflow.dag_run import actor_arguments, own_run_id, store_root
from qlora_retrain.runtimes.airflow.move_request import Movement, request_id
from qlora_retrain.runtimes.airflow.notify_operators import MOVED_ALIAS
from qlora_retrain.runtimes.airflow.operators import RETRY_BACKOFF

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.line import LineConfig
    from qlora_retrain.runtimes.airflow.publish_command import PublishCommand

_TASK = "move"
_PAUSE_SECONDS = 10.0
TIMEOUT = timedelta(hours=1)  # a node pool may have to grow, and every byte of the version is read


class MoveOperator(BaseOperator):  # type: ignore[misc]
    """Move an alias as the form of the DAG run says.

    Args:
        pipelines: The folder of the lines.
    """

    template_fields: Sequence[str] = ()

    def __init__(self, *, pipelines: Path, **kwargs: Any) -> None:
        super().__init__(**{"retries": 2, "execution_timeout": TIMEOUT, **RETRY_BACKOFF, **kwargs})
        self.pipelines = str(pipelines)
        self._mover: Mover | None = None

    def execute(self, context: Context) -> None:
        """Check who asks, and move the alias; fail with the reason if it may not move."""
        try:
            config = line_config(self.pipelines, context["params"]["line"])
            user = triggering_user(context)
            movement = Movement.from_form(context["params"], config.publish.promote_to, user)
            self._refuse(config, movement)
        except Problem as problem:
            fail(Ending.from_problem(_TASK, problem))
        self._mover = Mover(config, movement)
        self._mover.run(self, context, actor_arguments(context))

    def on_kill(self) -> None:
        """Stop the command."""
        if self._mover is not None:
            self._mover.command.on_kill()

    def _refuse(self, config: LineConfig, movement: Movement) -> None:
        from qlora_retrain.config import platform

        if movement.action == "rollback":
            return
        if movement.version is None:
            raise UsageError("version: empty; expected the version that the alias shall name")
        if movement.version == movement.current:
            raise UsageError(f"{config.line}@{movement.alias}: from_version and version are both {movement.version}")
        # Also where the line itself does not ask any more: its author may not drop the question.
        if config.publish.approval or config.line in platform.load().approvers:
            names = [movement.user] if movement.user else []
            refuse_approver(config.line, movement.version, names)


class Mover:
    """A move that is allowed, and the command that makes it.

    Args:
        config: The line.
        movement: The move.
    """

    def __init__(self, config: LineConfig, movement: Movement) -> None:
        from qlora_retrain.runtimes.airflow.publish_command import publish_command

        self.movement = movement
        self.command: PublishCommand = publish_command(config)

    def run(self, task: BaseOperator, context: Context, actor: list[str], *, num_tries: int = 1) -> None:
        """Make the move, and emit the event of the line's asset; fail the task if it is refused.

        Args:
            task: The task, whose outlets get the line's asset.
            context: Its context.
            actor: The arguments of the command that say who decided.
            num_tries: How often a command is run that may succeed when it is run again.
        """
        run_id, dag_run = own_run_id(context), context["dag_run"]
        origin = f"DAG run {dag_run.dag_id} {dag_run.run_id}"
        arguments = self.movement.command(store_root(), origin, request_id(run_id), actor)
        for i in range(num_tries):
            ending = self._run_once(arguments, run_id)
            if not ending.retry or i == num_tries - 1:
                break
            time.sleep(_PAUSE_SECONDS)
        if ending.code:
            fail(ending)
        self._emit_asset_event(task, context)
        context["ti"].xcom_push(key=MOVED_ALIAS, value=self.movement.alias)

    def _run_once(self, arguments: list[str], run_id: str) -> Ending:
        try:
            return self.command.run_command(arguments, run_id, TIMEOUT)
        except Problem as problem:
            return Ending.from_problem(_TASK, problem)
        except AirflowTaskTimeout:
            self.command.stop_step()
            return Ending.from_problem(_TASK, UsageError(f"stopped at its deadline, after {TIMEOUT}"))

    def _emit_asset_event(self, task: BaseOperator, context: Context) -> None:
        from qlora_retrain.storage import moves, open_store

        line, root = self.movement.line, store_root()
        version = moves.describe_current(open_store(root), line, self.movement.alias)
        # Which line it is, is known only now; Airflow reads the outlets when the task has ended.
        task.outlets = [AssetAlias(line)]
        asset = Asset(f"{root}/models/{line}", group="model")
        extra = {"version": version, "published": False, "moved": True, "alias": self.movement.alias}
        context["outlet_events"][AssetAlias(line)].add(asset, extra=extra)


def line_config(pipelines: str, line: str) -> LineConfig:
    """Return the config of a line.

    Raises:
        UsageError: If it has no file, or the file cannot be used.
    """
    from qlora_retrain.config.line import load

    path = Path(pipelines) / f"{line}.yaml"
    if not path.is_file():
        raise UsageError(f"line {line}: has no file {path.name}; expected the name of a line, which is also its DAG's")
    config = load(path)
    if config.line != line:
        raise UsageError(f"{path.name}: is of line {config.line}; expected one of line {line}")
    return config


def triggering_user(context: Context) -> str | None:
    """Return the user of Airflow who started the DAG run; None: a schedule, or another DAG's own run."""
    user: str | None = getattr(context["dag_run"], "triggering_user_name", None)
    return user or None


def refuse_approver(line: str, version: str, names: Sequence[str], *, requester: str | None = None) -> None:
    """Refuse a user who may not say that a version goes to production.

    Args:
        line: The line.
        version: The version.
        names: The user's name in Airflow, and an id where that is another one; empty: nobody.
        requester: Who asks for the approval, where there is a request.

    Raises:
        UsageError: If it is nobody, no approver of the line, or somebody who asked for the version or the approval.
    """
    from qlora_retrain.config import platform
    from qlora_retrain.storage import moves, open_store

    approvers = platform.load().approvers.get(line)
    if not names:
        raise UsageError(
            f"line {line}: asks for approval, and nobody signed in to start this run; let an approver do it"
        )
    if approvers is not None and not set(names) & set(approvers):
        raise UsageError(
            f"line {line}: {names[0]} is none of its approvers, whom platform.yaml names: {', '.join(approvers)}"
        )
    if set(names) & {requester, *moves.requesters(open_store(store_root()), line, version)}:
        raise UsageError(f"line {line}: {names[0]} asked for version {version}, so another person must approve it")


def fail(ending: Ending) -> NoReturn:
    """Fail the task as the ending says.

    Raises:
        AirflowException: For an ending that may be retried.
        AirflowFailException: For any other, so that Airflow does not retry.
    """
    # From none: Airflow logs what an exception came from too, and a library's own message may hold a URL's password.
    raise (AirflowException if ending.retry else AirflowFailException)(ending.summary()) from None
