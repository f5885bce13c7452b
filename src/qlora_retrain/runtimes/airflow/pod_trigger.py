"""What waits for a pod in the triggerer: Airflow's trigger, which also notices that its node will never say its end.

Airflow's own goes by the container's state, and on a lost node that is shown as running while the pod is there.
"""

from __future__ import annotations

from typing import Any

from airflow.providers.cncf.kubernetes.triggers.pod import ContainerState, KubernetesPodTrigger

from qlora_retrain.runtimes.kubernetes import pod_status


class PodTrigger(KubernetesPodTrigger):  # type: ignore[misc]
    """Fires when the pod's container ended, or when the pod is given up; the task then looks at the pod itself."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """By this class's own name: Airflow's method gives its own."""
        return f"{__name__}.{type(self).__name__}", super().serialize()[1]

    def define_pod_container_state(self, pod: Any) -> ContainerState:
        """The container's state; failed where the pod is given up."""
        return ContainerState.FAILED if pod_status.lost(pod) else super().define_pod_container_state(pod)
