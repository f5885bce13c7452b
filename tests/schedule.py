"""Which tests run one after the other in one process, and which of them begin first.

Two processes share the tests. Those of a file stay together, for they share models and stores. So do those that run
containers, for they share an engine and its images, and files that share an Airflow. Whatever takes long begins first,
so that at the end only short ones are left and both processes finish together.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

CONTAINERS = "containers"
# About how long the longest take, in seconds. A wrong number costs idle time at the end and nothing else.
SECONDS = {
    CONTAINERS: 650,
    "e2e/test_smollm2": 350,
    "demo/test_run": 230,
    "e2e/test_kubernetes": 150,
    "components/train_qlora/test_processes": 130,
    "e2e/test_pipeline": 130,
    "components/train_qlora/test_survival": 100,
    "dags/test_moves_in_airflow": 130,
    "demo/test_standalone_airflow": 80,
    "runtimes/airflow/test_live": 70,
    "demo/test_watched_data": 75,
    "demo/test_browser": 120,
    "e2e/test_verdicts": 70,
    "components/train_qlora/test_killed_for_memory": 50,
    "components/merge_adapter/test_step": 50,
    "components/train_qlora/test_steering": 40,
    "components/train_qlora/test_train": 40,
    "components/evaluate/test_step": 30,
    "pipeline/test_code_identity": 30,
    "storage/test_interrupted": 30,
    "components/merge_adapter/test_exports": 25,
    "components/merge_adapter/test_memory": 25,
    "components/merge_adapter/test_generated_answers": 20,
    "components/train_qlora/test_liger": 20,
    "dags/test_kfp_cluster": 20,
    "dags/test_kfp_tasks": 20,
    "e2e/test_s3": 20,
    "runtimes/airflow/test_local": 20,
    "runtimes/kubernetes/test_following": 20,
}
# Modules that share a fixture of the whole session, such as an Airflow, run with the first of them.
SHARING = {"dags/test_consumer_in_airflow": "dags/test_moves_in_airflow"}


def group_of(nodeid: str) -> str:
    """Return the name of the tests that this one runs together with."""
    name = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    return CONTAINERS if name.startswith(f"{CONTAINERS}/") else SHARING.get(name, name)


def start_order(nodeid: str) -> tuple[float, str]:
    """Return a key to sort by: what takes longest begins first, and what is together stays so, in its own order."""
    group = group_of(nodeid)
    return -SECONDS.get(group, 0), group


class Scheduler(LoadScopeScheduling):
    """Hands out whole groups, in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self.config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
