"""A trigger that waits for a pod: Airflow's own, extended to notice that the pod's node is lost.

Airflow's trigger looks only at the container's state. If the node is lost, Kubernetes shows the container as running
for as long as the pod exists.
"""

from __future__ import annotations

from typing import Any

from airflow.providers.cncf.kubernetes.triggers.pod import ContainerState, KubernetesPodTrigger

from qlora_retrain.runtimes.kubernetes import pod_status


class PodTrigger(KubernetesPodTrigger):  # type: ignore[misc]
    """Fire when the pod's container ended, or when its node is lost; the task then reads the pod's status itself."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return this class's path for the triggerer; Airflow's method would return that of its own class."""
        return f"{__name__}.{type(self).__name__}", super().serialize()[1]

    def define_pod_container_state(self, pod: Any) -> ContainerState:
        """Return the container's state; failed where its node is lost."""
        return ContainerState.FAILED if pod_status.lost_node(pod) else super().define_pod_container_state(pod)
