"""The task of `qlora-retrain-approval`: ask a person whether a version becomes production, and move it if so.

Asking and moving are one task. Between two tasks the answer would travel as an XCom, which whoever may edit XComs could
write. Here it is what Airflow's API stored of the user whom it authenticated, and who asked is compared once more after
the answer. While it waits, the task holds no worker, no triggerer and no slot, and later runs of the line go on.

A request is void (12) once production names another version than the one it was judged against, or staging another one
than the one it is about. Nobody's answer is Reject.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk.exceptions import AirflowSkipException

from qlora_retrain.core.aliases import PRODUCTION, STAGING
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.runtimes.airflow.dag_run import actor_name, own_run_id, store_root
from qlora_retrain.runtimes.airflow.move import TIMEOUT, Mover, fail, line_config, refuse_approver, triggering_user
from qlora_retrain.runtimes.airflow.move_request import Movement, request_id
from qlora_retrain.runtimes.airflow.operators import RETRY_BACKOFF

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.line import LineConfig

_TASK = "approve"
APPROVE, REJECT = "Approve", "Reject"


class ApprovalOperator(HITLOperator):  # type: ignore[misc]
    """Ask for approval of the version that the DAG run's form names; on approval, move production.

    Args:
        pipelines: The folder of the lines.
    """

    # What a line's author or a report says is shown as it is.
    template_fields: Sequence[str] = ()

    def __init__(self, *, pipelines: Path, **kwargs: Any) -> None:
        # The text, the users and the time depend on the line, so `execute` sets them.
        options = {"subject": _TASK, "options": [APPROVE, REJECT], "defaults": REJECT}
        timeouts = {"response_timeout": timedelta(days=30), "execution_timeout": TIMEOUT}
        super().__init__(**{"retries": 2, **RETRY_BACKOFF, **options, **timeouts, **kwargs})
        self.pipelines = str(pipelines)
        self._mover: Mover | None = None

    def execute(self, context: Context) -> Any:
        """Ask, and wait for the answer; skip where this request has moved production already."""
        from qlora_retrain.runtimes.airflow import approval_text, links
        from qlora_retrain.storage import moves, open_store

        form, requester = context["params"], triggering_user(context)
        store = open_store(store_root())
        try:
            config = line_config(self.pipelines, form["line"])
            # Tried again after the move was made: nobody is asked twice.
            request = moves.Request(config.line, PRODUCTION, "", request_id=request_id(own_run_id(context)))
            if moves.find_done(store, request):
                self.log.info("%s@%s: %s already", config.line, PRODUCTION, form["version"])
                return None
            refuse_void(config.line, form["version"], form["from_version"])
            users = self._users(config, form["version"], requester)
            text = approval_text.body(store, config.line, form["version"], form["from_version"], requester)
        except Problem as problem:
            fail(Ending.from_problem(_TASK, problem))
        current = None if form["from_version"] == moves.NOTHING else form["from_version"]
        page = links.version_path(config.line, form["version"], current)
        self.body = f"[{'Compare the two, and read the reports' if current else 'Read its reports'}]({page})\n\n{text}"
        self.subject = f"{config.line}: may {form['version']} become {PRODUCTION}?"
        self.assigned_users = [{"id": user, "name": user} for user in users]
        self.response_timeout = timedelta(hours=config.publish.approval_hours)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> None:
        """Take the answer: skip what is rejected, refuse what may not be approved, otherwise move production."""
        answer = super().execute_complete(context, event)
        form, requester, responder = context["params"], triggering_user(context), answer["responded_by_user"] or {}
        # Some of Airflow's user stores know a person by an id that is not the name.
        names = [responder[key] for key in ("name", "id") if responder.get(key)]
        if answer["chosen_options"] != [APPROVE]:
            raise AirflowSkipException(f"rejected by {names[0]}" if names else "rejected: nobody answered in time")
        try:
            config = line_config(self.pipelines, form["line"])
            refuse_approver(config.line, form["version"], names, requester=requester)
            refuse_void(config.line, form["version"], form["from_version"])
        except Problem as problem:
            fail(Ending.from_problem(_TASK, problem))
        movement = Movement(
            line=config.line,
            action="promote",
            version=form["version"],
            current=form["from_version"],
            alias=PRODUCTION,
            reason=f"approved by {names[0]}, asked for by {requester or 'a run that nobody started by hand'}",
            user=names[0],
        )
        self._mover = Mover(config, movement)
        # Another try of the task would ask again.
        self._mover.run(self, context, ["--triggered-by", actor_name(names[0])], num_tries=3)

    def on_kill(self) -> None:
        """Stop the command."""
        if self._mover is not None:
            self._mover.command.on_kill()

    def _users(self, config: LineConfig, version: str, requester: str | None) -> list[str]:
        """Return the users who may answer; empty: whoever may answer in Airflow.

        Raises:
            UsageError: If the line has approvers, and each of them asked for this version.
        """
        from qlora_retrain.config import platform
        from qlora_retrain.storage import moves, open_store

        approvers = platform.load().approvers.get(config.line)
        if approvers is None:
            return []
        requesters = {requester, *moves.requesters(open_store(store_root()), config.line, version)}
        users = [user for user in approvers if user not in requesters]
        if not users:
            raise UsageError(
                f"line {config.line}: each of its approvers ({', '.join(approvers)}) asked for version {version}, and "
                "nobody approves what they asked for; name another approver in platform.yaml, and clear this task"
            )
        return users


def refuse_void(line: str, version: str, current: str) -> None:
    """Refuse a request that is about another state of the line than that of now.

    Args:
        line: The line.
        version: The version that is to become production.
        current: The version in production that it was judged against, or `none`.

    Raises:
        UsageError: If production or staging names another version now; it says who moved it, when and why.
    """
    from qlora_retrain.storage import open_store, registry

    store = open_store(store_root())
    for alias, expected, next_step in (
        (PRODUCTION, current, "the verdict compared with another version, so run the line again"),
        (STAGING, version, "that version has a request of its own"),
    ):
        state, _ = registry.read_alias(store, line, alias)
        actual = state.version if state else "none"
        if actual != expected:
            moved = f", moved by {state.actor} at {state.at} ({state.reason})" if state else ""
            raise UsageError(
                f"this request is void: {line}@{alias} named {expected} when it was made, and names {actual} "
                f"now{moved}; {next_step}"
            )
