"""The ids of this project's DAGs that are no line's own.

A line of such a name would take the DAG away from whoever may decide about it: the ids follow from `platform.yaml`,
and lines are written by others.
"""

from __future__ import annotations

import contextlib

from qlora_retrain.config import platform
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.airflow import move_request

LAB_SUFFIX = "-lab"
CONSUMER_SUFFIX = "-consume"


def consumer_id(line: str) -> str:
    """Return the id of the DAG that follows a line as its consumer."""
    return f"{line}{CONSUMER_SUFFIX}"


def reserved() -> frozenset[str]:
    """Return the ids that no line's DAG may have."""
    settings = platform.PlatformConfig()
    # Where platform.yaml cannot be used, it gives nobody a DAG, and each line says why.
    with contextlib.suppress(UsageError):
        settings = platform.load()
    labs = {f"{line}{LAB_SUFFIX}" for line in settings.labs}
    return frozenset({*move_request.DAG_IDS, *labs, *map(consumer_id, settings.consumers)})
