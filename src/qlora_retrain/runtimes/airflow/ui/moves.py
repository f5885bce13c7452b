"""Start the DAG that moves an alias, in the name of the user who pressed the button; nothing is written here.

The DAG `qlora-retrain-move` does the work under the account that may publish. It gets the version that the alias named
when the person decided, and refuses where that is no longer so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from airflow.api_fastapi.common.dagbag import create_dag_bag
from airflow.api_fastapi.core_api.datamodels.dag_run import TriggerDAGRunPostBody
from airflow.api_fastapi.core_api.routes.public.dag_run import trigger_dag_run
from airflow.models import Log
from airflow.models.dag import DagModel
from airflow.models.dagrun import DagRun
from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import select

from qlora_retrain.runtimes.airflow.ui.access import VERSION_PATTERN
from qlora_retrain.storage.registry import PRODUCTION, Alias, earlier_move

MOVE_DAG = "qlora-retrain-move"
# What `from_version` says where the alias named nothing.
NO_VERSION = "none"
MAX_REASON_CHARACTERS = 500
_MAX_RUNS_READ = 100
_MAX_RUNS_SHOWN = 5


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("expected a sentence on one line")
    return text.strip()


class MoveForm(BaseModel):
    """What a form asks for.

    Attributes:
        action: To which side of the history the alias goes.
        version: The version that it shall name.
        from_version: The version that it named when the page was made; empty: none.
        reason: A sentence for the audit trail.
        token: See `form_guard`.
    """

    model_config = ConfigDict(extra="forbid")
    action: Literal["promote", "rollback"]
    version: str = Field(pattern=VERSION_PATTERN)
    from_version: str = Field(default="", pattern=rf"^$|{VERSION_PATTERN}")
    reason: Annotated[str, AfterValidator(_one_line)] = Field(max_length=MAX_REASON_CHARACTERS)
    token: str = Field(max_length=1000)


@dataclass(frozen=True, slots=True)
class MoveRun:
    """A run of the DAG for one line."""

    run_id: str
    state: str
    user: str
    action: str
    version: str
    at: str


def is_available(session: Any) -> bool:
    """Return whether this Airflow has the DAG."""
    statement = select(DagModel.dag_id).where(DagModel.dag_id == MOVE_DAG, ~DagModel.is_stale)
    return session.scalar(statement) is not None


def start(request: Request, user: Any, session: Any, line: str, form: MoveForm) -> str:
    """Start a run of the DAG, with an entry in Airflow's own audit log; return its id."""
    conf = {
        "line": line,
        **form.model_dump(exclude={"token"}),
        "from_version": form.from_version or NO_VERSION,
        # The alias that the page showed, whatever the line's own is.
        "alias": PRODUCTION,
    }
    body = TriggerDAGRunPostBody(logical_date=None, conf=conf)
    # What Airflow's own route does, after its permission was asked for.
    run = trigger_dag_run(dag_id=MOVE_DAG, body=body, dag_bag=_dag_bag(), user=user, session=session, request=request)
    run_id = str(run.run_id)
    name = user.get_name()
    session.add(Log("trigger_dag_run", owner=name, owner_display_name=name, dag_id=MOVE_DAG, run_id=run_id))
    return run_id


def recent_runs(session: Any, line: str) -> list[MoveRun]:
    """Return the newest runs of the DAG for a line, the newest first."""
    statement = select(DagRun).where(DagRun.dag_id == MOVE_DAG).order_by(DagRun.run_after.desc()).limit(_MAX_RUNS_READ)
    runs = [run for run in session.scalars(statement) if isinstance(run.conf, dict) and run.conf.get("line") == line]
    return [
        MoveRun(
            run_id=run.run_id,
            state=str(getattr(run.state, "value", run.state)),
            user=str(run.triggering_user_name or "-"),
            action=str(run.conf.get("action")),
            version=str(run.conf.get("version")),
            at=f"{run.run_after:%Y-%m-%d %H:%M:%S}",
        )
        for run in runs[:_MAX_RUNS_SHOWN]
    ]


def rollback_target(state: Alias) -> str | None:
    """Return the version to which a rollback goes back: the newest earlier one that was not rejected."""
    # Whether it is what was published is seen by the rollback, which says what to do where it is not.
    earlier = earlier_move(state)
    return earlier.version if earlier else None


@cache
def _dag_bag() -> Any:
    # The server's own is in the state of the application around this one, which a mounted one does not see.
    return create_dag_bag()
