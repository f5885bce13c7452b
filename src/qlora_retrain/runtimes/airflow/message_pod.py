"""The pod of a task that tells people or a server something: an account and a network policy for it alone.

Airflow's KubernetesExecutor starts it, because addresses and secrets are connections: a task gets them from Airflow, a
pod of a step does not. So it has the image and the files of Airflow's workers, and of its own:

- the service account that `messages` of the cluster's profile names, and no token for the cluster's API;
- a label, by which the policy of `qlora-retrain egress PROFILE --messages` selects it.
"""

from __future__ import annotations

import os
from typing import Any

from qlora_retrain.config import cluster_profile
from qlora_retrain.core.errors import UsageError

EXECUTOR = "KubernetesExecutor"


def task_arguments() -> dict[str, Any]:
    """Return by which executor and in what pod a message is sent; nothing where the profile has no `messages`.

    Raises:
        UsageError: If Airflow has no KubernetesExecutor, or starts pods in another namespace: then account or policy
            would be another without a word.
    """
    if not os.environ.get(cluster_profile.PROFILE_VARIABLE):
        return {}
    pods = cluster_profile.from_environment().messages
    if pods is None:
        return {}
    executor = _executor_name(pods.namespace)

    from kubernetes.client import models as k8s

    from qlora_retrain.runtimes.docker.container_spec import STEP_LABEL
    from qlora_retrain.runtimes.kubernetes.egress import MESSAGE_LABEL

    pod = k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(labels={STEP_LABEL: MESSAGE_LABEL}),
        spec=k8s.V1PodSpec(
            containers=[k8s.V1Container(name="base")],  # Airflow's own name for the container of a task
            service_account_name=pods.service_account,
            automount_service_account_token=False,
        ),
    )
    return {"executor": executor, "executor_config": {"pod_override": pod}}


def _executor_name(namespace: str) -> str:
    """Return the name that this Airflow has for its KubernetesExecutor.

    Raises:
        UsageError: If it has none, or one for another namespace.
    """
    from airflow.sdk.configuration import conf

    configured: str = conf.get("core", "executor")
    # `NAME:CLASS` gives an executor another name.
    entries = [entry.strip().rpartition(":") for entry in configured.split(",")]
    names = [name or path for name, _, path in entries if path.rpartition(".")[2] == EXECUTOR]
    if not names:
        raise UsageError(
            f"messages of the cluster's profile: need the {EXECUTOR}, and core.executor of this Airflow is "
            f"{configured}; expected {configured},{EXECUTOR}"
        )
    used_namespace = conf.get("kubernetes_executor", "namespace", fallback="default")
    if used_namespace != namespace:
        raise UsageError(
            f"messages.namespace of the cluster's profile is {namespace}, and this Airflow starts pods in "
            f"{used_namespace} (kubernetes_executor.namespace); their network policy must be in the same"
        )
    return names[0]
