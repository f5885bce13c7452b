"""End an Airflow task as its step ended: with its reason first in the log, in the run's folder and in its note."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, NoReturn

from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from qlora_retrain.core import errors, graph
from qlora_retrain.runtimes.airflow.dag_run import (
    is_of_lab,
    own_run_id,
    plan_run_id,
    plan_uri,
    push_note,
    store_root,
)

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.core.endings import Ending

_log = logging.getLogger(__name__)


def failure_note(context: Context, ending: Ending) -> str:
    """Return how a task failed, for the run's note; of a refusal for quality with the verdict's numbers."""
    from qlora_retrain.pipeline import run_summary
    from qlora_retrain.pipeline.plan import Plan

    numbers = ""
    if ending.code == errors.Exit.QUALITY_REFUSED:
        # Without the numbers, the note has the reason all the same.
        with contextlib.suppress(Exception):
            numbers = run_summary.verdict_line(Plan.load(plan_uri(context)))
    return "\n".join(filter(None, (ending.sentence(), numbers)))


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
    if is_of_lab(context):
        if ending.code == errors.Exit.QUALITY_REFUSED:
            raise AirflowSkipException(ending.summary()) from None
    else:
        push_note(context, lambda: failure_note(context, ending))
    # Airflow logs an exception as "Task failed with exception" and a traceback; its log of errors begins with this.
    _log.error("%s", ending.summary())
    # From none: Airflow logs what an exception came from too, and a library's own message may hold a URL's password.
    if ending.retry and not is_last_try:
        raise AirflowException(ending.summary()) from None
    raise AirflowFailException(ending.summary()) from None
