"""Stop a container, wait for its grace period and remove it, after its Airflow task was killed.

Airflow gives a killed task five seconds, but a training step needs up to a minute to save a checkpoint. So this file
runs as a process of its own, which outlives the task.

Command: `python cleanup.py DOCKER_URL CONTAINER`
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

GRACE_SECONDS = 70  # ten more than the container's own first process allows the step
READ_SECONDS = 2  # for a reader of the log to reach its end, because removing the container removes the log


def stop_and_remove(client: Any, container: str) -> None:
    """Stop and remove the container; do nothing where there is none.

    Args:
        client: docker's `APIClient`, with a timeout longer than `GRACE_SECONDS`.
        container: The container's name or id.
    """
    from docker.errors import APIError

    # An error means that the container or its engine is gone, and no task is left to which it could be reported.
    with contextlib.suppress(APIError):
        client.stop(container, timeout=GRACE_SECONDS)
        time.sleep(READ_SECONDS)
    with contextlib.suppress(APIError):
        client.remove_container(container, force=True)


if __name__ == "__main__":
    from docker import APIClient

    # The client's timeout must outlast the engine's answer to `stop`, which comes after the grace period.
    stop_and_remove(APIClient(base_url=sys.argv[1], timeout=GRACE_SECONDS + 30), sys.argv[2])
