"""An Airflow plugin: write why a DAG run was started, and how it ended, into the run's note.

A task cannot write a note: it has no database, and the API that tasks talk to knows none. So a task leaves its text as
an XCom, and this listener, which Airflow calls in the scheduler when a run begins or ends, writes the note there. It
reads Airflow's own database and nothing else: no store, no file, no network.

The note of a person stays. What tasks and forms say is shown as text: Airflow renders notes as Markdown, whose marks
are escaped, and it drops HTML.

Airflow finds the plugin by its entry point. Without it a run has no note, and nothing else changes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin

from qlora_retrain.core import visible_text
from qlora_retrain.runtimes.airflow import preload
from qlora_retrain.runtimes.airflow.form_fields import NOTE_KEY, stated_reason

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun
    from sqlalchemy.orm import Session

TAG = "qlora-retrain"
# Airflow's column holds so many.
MAX_NOTE_CHARACTERS = 1000
_RESULT, _REASON = "Result: ", "Reason: "
# In Markdown: between paragraphs, each of which is one part of the note, and between the lines of a paragraph.
_PART_BREAK, _LINE_BREAK = "\n\n", "  \n"
_LEAST_CHARACTERS = 40
_MARKDOWN = re.compile(r"([\\`*_\[\]{}<>|~#&$!])")


@hookimpl  # type: ignore[untyped-decorator]
def on_dag_run_running(dag_run: DagRun, msg: str) -> None:
    """Write why the run was started; of a run that begins again, remove how it ended before."""
    if _is_ours(dag_run):
        _set_note(dag_run)


@hookimpl  # type: ignore[untyped-decorator]
def on_dag_run_success(dag_run: DagRun, msg: str) -> None:
    """Write how the run ended."""
    _note_ending(dag_run, msg)


@hookimpl  # type: ignore[untyped-decorator]
def on_dag_run_failed(dag_run: DagRun, msg: str) -> None:
    """Write why the run failed."""
    _note_ending(dag_run, msg)


def _note_ending(dag_run: DagRun, msg: str) -> None:
    from sqlalchemy.orm import object_session

    session = object_session(dag_run)
    if session is None or not _is_ours(dag_run):
        return
    # Nothing else of the scheduler's work may be written before its time.
    with session.no_autoflush:
        texts = list(_texts_of_tasks(session, dag_run))
        if msg == "timed_out":
            texts.append("The run was stopped at its deadline.")
        if not texts and dag_run.state == "failed":
            texts = [f"Failed: {', '.join(_failed_tasks(session, dag_run)) or msg}. The log says why."]
        _set_note(dag_run, "\n".join(texts))


def _texts_of_tasks(session: Session, dag_run: DagRun) -> Iterable[str]:
    """Yield what the run's tasks left, the oldest first; a text that two tasks left comes once."""
    from airflow.models.xcom import XComModel

    query = XComModel.get_many(run_id=dag_run.run_id, key=NOTE_KEY, dag_ids=dag_run.dag_id)
    rows = sorted(session.scalars(query), key=lambda row: row.timestamp)
    values = (XComModel.deserialize_value(row) for row in rows)
    yield from dict.fromkeys(value for value in values if isinstance(value, str))


def _failed_tasks(session: Session, dag_run: DagRun) -> list[str]:
    tasks: Iterable[Any] = dag_run.get_task_instances(state=["failed"], session=session)
    return [task.task_id for task in tasks]


def _is_ours(dag_run: DagRun) -> bool:
    """Return whether the run is of a DAG of this project, as the DAG's tags say."""
    # The scheduler has set it; a run that a person marks as ended may have none, and is looked up.
    dag = getattr(dag_run, "dag", None)
    tags = dag.tags if dag is not None else (tag.name for tag in dag_run.dag_model.tags)
    return TAG in tags


def _own_part(dag_run: DagRun) -> str:
    """Return the note without what this module has written: what a person wrote."""
    parts = (dag_run.note or "").split(_PART_BREAK)
    return _PART_BREAK.join(part for part in parts if part and not part.startswith((_RESULT, _REASON)))


def _set_note(dag_run: DagRun, result: str = "") -> None:
    """Write the note: how the run ended, why it was started, and what a person wrote.

    In this order, because Airflow's page of a run shows the first line alone until a person opens the note. Where there
    is not room for all, the reason is cut first, then the result.
    """
    own = _own_part(dag_run)
    room = MAX_NOTE_CHARACTERS - len(own) - 2 * len(_PART_BREAK)
    ending = _shorten(_RESULT + escape_markdown(result).replace("\n", _LINE_BREAK), room) if result else ""
    stated = stated_reason(dag_run.conf) if isinstance(dag_run.conf, dict) else ""
    reason = _shorten(_REASON + escape_markdown(stated), room - len(ending)) if stated else ""
    note = _PART_BREAK.join(filter(None, (ending, reason, own)))
    if note != (dag_run.note or ""):
        dag_run.note = note


def _shorten(text: str, room: int) -> str:
    """Cut a text to the room that is left; where that is less than a few words, leave it out."""
    if len(text) <= room:
        return text
    return f"{text[: room - 4]} ..." if room > _LEAST_CHARACTERS else ""


def escape_markdown(text: str) -> str:
    """Return a stranger's text so that neither Markdown nor a terminal reads a mark in it."""
    return _MARKDOWN.sub(r"\\\1", visible_text.escape_controls(text))


class RunNotes(AirflowPlugin):  # type: ignore[misc]
    """The plugin; its listeners are this module and the one that lets tasks begin earlier."""

    name = "qlora_retrain_run_notes"
    listeners: ClassVar = [sys.modules[__name__], preload]
