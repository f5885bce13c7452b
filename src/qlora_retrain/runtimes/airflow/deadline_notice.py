"""Tell people that a run has not ended by its deadline; Airflow's triggerer calls `tell`, while the run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from qlora_retrain.core.errors import TryAgain

_DELAYS_SECONDS = (10, 30, 90)


async def tell(*, line: str, kind: str, connection: str, to: Sequence[str], context: dict[str, Any]) -> str:
    """Send the message, and try again where that may help; return what was done.

    Args:
        line: The line.
        kind: `webhook`, `email` or `apprise`.
        connection: The connection's name.
        to: Of emails, the addresses.
        context: The run and its deadline, as the scheduler gives them.
    """
    from qlora_retrain.runtimes.airflow import delivery, run_message

    dag_run, deadline = context["dag_run"], str(context["deadline"]["deadline_time"])
    # Airflow forgets the deadline of a run that succeeded, and not that of one that failed in time.
    if dag_run["end_date"] and datetime.fromisoformat(str(dag_run["end_date"])) < datetime.fromisoformat(deadline):
        return "the run ended in time"

    message = run_message.of_deadline(dag_run, line, deadline)
    for delay in (*_DELAYS_SECONDS, None):
        try:
            await asyncio.to_thread(delivery.deliver, kind, connection, message, to)
        except TryAgain:
            if delay is None:
                raise
            await asyncio.sleep(delay)
        else:
            break
    return message.sentence
