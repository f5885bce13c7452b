"""How Airflow's KubernetesPodOperator follows, keeps and retries a pod: its arguments that are the same everywhere."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

OPERATOR_DEFAULTS: dict[str, Any] = {
    "random_name_suffix": False,
    "deferrable": True,
    "do_xcom_push": False,
    "get_logs": True,
    "logging_interval": 30,  # seconds
    "startup_timeout_seconds": 1800,  # a node pool may have to grow, and the image is several gigabytes
    "on_finish_action": "delete_succeeded_pod",
    "on_kill_action": "delete_pod",
    "log_pod_spec_on_failure": False,
    # A full quota, a drain or a lost node lasts longer than a throttled store; these span at least half an hour.
    "retries": 8,
    "retry_delay": timedelta(seconds=15),
    "max_retry_delay": timedelta(minutes=10),
}
