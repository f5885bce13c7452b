"""A trigger that waits for a pod: Airflow's own, which notices that the pod's node is lost, and copies a shorter log.

Airflow's trigger looks only at the container's state. If the node is lost, Kubernetes shows the container as running
for as long as the pod exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from airflow.providers.cncf.kubernetes.triggers.pod import ContainerState, KubernetesPodTrigger
from airflow.providers.cncf.kubernetes.utils.pod_manager import AsyncPodManager

from qlora_retrain.runtimes.airflow.step_log import StepLog
from qlora_retrain.runtimes.kubernetes import pod_spec, pod_status

if TYPE_CHECKING:
    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator


class StepPodManager(AsyncPodManager):  # type: ignore[misc]
    """Copy a pod's log to the task's, with the lines of a step's progress that a person notices."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # One for the whole step, since the log is read every half minute.
        self._step_log = StepLog()

    def _emit_container_logs(self, logs: list[str], *args: Any) -> None:
        super()._emit_container_logs(list(self._visible_lines(logs)), *args)

    def _visible_lines(self, logs: Iterable[str]) -> Iterator[str]:
        for line in logs:
            # As Kubernetes writes it: the time, a space, and what the step printed.
            timestamp, _, text = line.partition(" ")
            visible = self._step_log.visible_text(text.rstrip())
            if visible is not None:
                yield f"{timestamp} {visible}"


class PodTrigger(KubernetesPodTrigger):  # type: ignore[misc]
    """Fire when the pod's container ended, or when its node is lost; the task then reads the pod's status itself."""

    @classmethod
    def following(cls, task: KubernetesStepOperator, last_log_time: Any, trigger_kwargs: dict[str, Any]) -> Self:
        """Return the trigger that waits for the task's pod.

        It connects to the cluster by itself, so no credential of the worker is in its arguments. It looks for a
        kubeconfig by default; with `in_cluster` it uses the service account's token instead.

        Args:
            task: The task, with its pod prepared.
            last_log_time: Until when the pod's log was copied; None: nothing was.
            trigger_kwargs: What the trigger's event returns to the task.
        """
        return cls(
            pod_name=task.name,
            pod_namespace=task.namespace,
            trigger_start_time=datetime.now(UTC),
            base_container_name=pod_spec.CONTAINER_NAME,
            kubernetes_conn_id=task.kubernetes_conn_id,
            in_cluster=task.hook.is_in_cluster or None,
            poll_interval=task.poll_interval,
            startup_timeout=task.startup_timeout_seconds,
            schedule_timeout=task.startup_timeout_seconds,
            on_finish_action="keep_pod",
            termination_grace_period=task.termination_grace_period,
            last_log_time=last_log_time,
            logging_interval=task.logging_interval,
            trigger_kwargs=trigger_kwargs,
        )

    @cached_property
    def pod_manager(self) -> StepPodManager:
        """What reads the pod's log."""
        return StepPodManager(async_hook=self.hook)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return this class's path for the triggerer; Airflow's method would return that of its own class."""
        return f"{__name__}.{type(self).__name__}", super().serialize()[1]

    def define_pod_container_state(self, pod: Any) -> ContainerState:
        """Return the container's state; failed where its node is lost."""
        return ContainerState.FAILED if pod_status.lost_node(pod) else super().define_pod_container_state(pod)
