"""Stop a container, allow it its grace period, remove it: what is left to do when a task is killed.

Airflow gives a task five seconds, a training step wants a minute to save a checkpoint; so this runs by itself.

Command: `python docker_sweep.py DOCKER_URL NAME`
"""

from __future__ import annotations

import contextlib
import sys

GRACE_SECONDS = 70  # ten more than the container's own first process allows the step


def sweep(url: str, name: str) -> None:
    """Stop and remove the container; nothing to do where there is none."""
    from docker import APIClient
    from docker.errors import APIError

    client = APIClient(base_url=url, timeout=GRACE_SECONDS + 30)
    with contextlib.suppress(APIError):
        client.stop(name, timeout=GRACE_SECONDS)
    with contextlib.suppress(APIError):
        client.remove_container(name, force=True)


if __name__ == "__main__":
    sweep(sys.argv[1], sys.argv[2])
