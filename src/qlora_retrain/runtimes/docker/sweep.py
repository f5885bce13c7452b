"""Stop a container, allow it its grace period, remove it: what is left to do when a task is killed.

Airflow gives a task five seconds, a training step wants a minute to save a checkpoint; so this runs by itself.

Command: `python docker_sweep.py DOCKER_URL NAME`
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

GRACE_SECONDS = 70  # ten more than the container's own first process allows the step
READ_SECONDS = 2  # in which whoever follows the log reads its end: it goes with the container


def sweep(client: Any, name: str) -> None:
    """Stop and remove the container; nothing to do where there is none.

    Args:
        client: docker's `APIClient`, patient for longer than `GRACE_SECONDS`.
        name: The container's name or id.
    """
    from docker.errors import APIError

    with contextlib.suppress(APIError):
        client.stop(name, timeout=GRACE_SECONDS)
        time.sleep(READ_SECONDS)
    with contextlib.suppress(APIError):
        client.remove_container(name, force=True)


if __name__ == "__main__":
    from docker import APIClient

    sweep(APIClient(base_url=sys.argv[1], timeout=GRACE_SECONDS + 30), sys.argv[2])
