"""Airflow's pool of GPUs, by its API: it exists, counts what waits, and has no more slots than the quota has GPUs.

Environment: `QLORA_RETRAIN_AIRFLOW_TOKEN`, a token of Airflow's API; without it the request has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from qlora_retrain.runtimes.kubernetes.findings import Finding, fault, unknown

TOKEN_VARIABLE = "QLORA_RETRAIN_AIRFLOW_TOKEN"  # noqa: S105 - a variable's name
_TIMEOUT_SECONDS = 15


def check_pool(
    pool: str | None, gpu_resource: str | None, quotas: Sequence[dict[str, Any]], url: str | None
) -> Iterator[Finding]:
    """The pool is there as `docs/deploy.md` makes it."""
    if pool is None:
        return
    if url is None:
        remedy = f"pass --airflow URL, or run: airflow pools list (expected {pool}, include_deferred: True)"
        yield unknown("pool", "Airflow was not asked", remedy)
        return
    document, reason = _read(f"{url.rstrip('/')}/api/v2/pools/{quote(pool, safe='')}")
    gpus = [int(quota["spec"]["hard"].get(f"requests.{gpu_resource}", 0)) for quota in quotas]
    command = f"airflow pools set --include-deferred {pool} {min(gpus, default=1)} GPUs"
    if document is None:
        state = fault("pool", f"pool {pool}", "that it exists", reason, command) if reason == "404" else None
        yield state or unknown("pool", f"Airflow does not tell: {reason}", f"set {TOKEN_VARIABLE}, or check the URL")
        return
    if not document.get("include_deferred"):
        expected = "include_deferred: true, because a waiting task holds its GPU"
        yield fault("pool", f"pool {pool}", expected, "false", command)
    slots = int(document.get("slots", 0))
    if gpus and slots > min(gpus):
        yield fault("pool", f"pool {pool}", f"at most {min(gpus)} slots, as the quota has GPUs", str(slots), command)


def _read(url: str) -> tuple[dict[str, Any] | None, str]:
    """Return a document of Airflow's API, or the reason why there is none."""
    import urllib3

    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib3.PoolManager() as manager:
            answer = manager.request(
                "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, retries=False, redirect=False
            )
            body, status = answer.data, answer.status
        document = json.loads(body)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        return None, str(error)
    is_pool = status == 200 and isinstance(document, dict)
    return (document, "") if is_pool else (None, str(status))
