"""A trigger that waits for a pod: Airflow's own, which notices lost nodes, reports what it saw last and logs less.

Airflow's trigger looks only at the container's state. If the node is lost, Kubernetes shows the container as running
for as long as the pod exists. It also stops where the log cannot be read, although the pod can be followed without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook
from airflow.providers.cncf.kubernetes.triggers.pod import ContainerState, KubernetesPodTrigger
from airflow.providers.cncf.kubernetes.utils.pod_manager import (
    AsyncPodManager,
    PodLaunchTimeoutException,
    parse_log_line,
)
from airflow.triggers.base import TriggerEvent
from kubernetes_asyncio.client import ApiException, V1ObjectMeta, V1Pod, V1PodStatus

from qlora_retrain.runtimes.airflow.pod_observation import Observation
from qlora_retrain.runtimes.airflow.step_log import StepLog
from qlora_retrain.runtimes.kubernetes import pod_api, pod_spec, pod_status

if TYPE_CHECKING:
    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

# A kubelet that falls silent lets a request for a log wait for ever; the pod itself can be read all the same.
_LOG_TIMEOUT_SECONDS = 20
_LAST_LINES = 10
_MAX_LINE_CHARACTERS = 5_000  # a step's ending fits


class ObservingHook(AsyncKubernetesHook):  # type: ignore[misc]
    """Airflow's connection to the API, which remembers what it last saw of the pod."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._pod: Any = None
        self._last_lines = deque[str](maxlen=_LAST_LINES)
        self._first_seen, self._last_seen = 0.0, 0.0

    @property
    def observation(self) -> Observation:
        """What was last seen of the pod."""
        return Observation(self._pod, tuple(self._last_lines), self._last_seen - self._first_seen)

    async def get_pod(self, name: str, namespace: str) -> Any:
        """Return the pod as it is now; where there is none, one that failed, so that the trigger fires."""
        try:
            pod = await super().get_pod(name, namespace)
        except ApiException as error:
            if error.status != 404:
                raise
            # The task finds out by itself that the pod is gone. Airflow's trigger would log a traceback.
            return V1Pod(
                metadata=V1ObjectMeta(name=name, namespace=namespace),
                status=V1PodStatus(phase="Failed", container_statuses=[]),
            )
        self._last_seen = time.monotonic()
        if self._pod is None:
            self._first_seen = self._last_seen
        self._pod = pod
        return pod

    async def read_logs(
        self, name: str, namespace: str, container_name: str | None = None, since_seconds: int | None = None
    ) -> list[str]:
        """Return the lines of the container's log, each with its time.

        Raises:
            LogUnavailable: If the answer is no log: the kubelet's sentence about one, or the API's error.
        """
        if since_seconds is not None:
            since_seconds = pod_api.log_seconds(timedelta(seconds=since_seconds))
        lines: list[str] = await super().read_logs(name, namespace, container_name, since_seconds)
        # The client raises for no status here, and a kubelet without the log answers with the status of a success.
        if lines and parse_log_line(lines[0])[0] is None:
            raise pod_api.LogUnavailable(lines[0].strip())
        for line in lines[-_LAST_LINES:]:
            text = parse_log_line(line)[1][:_MAX_LINE_CHARACTERS].rstrip("\n")
            # Requests overlap, because the API takes whole seconds.
            if text not in self._last_lines:
                self._last_lines.append(text)
        return lines


class PodManager(AsyncPodManager):  # type: ignore[misc]
    """Airflow's reader of logs: it goes on where one cannot be read, and copies the progress that a person notices."""

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

    async def fetch_container_logs_before_current_sec(
        self, pod: Any, container_name: str, since_time: Any = None
    ) -> Any:
        """Copy the log since that time; return until when it was copied."""
        try:
            async with asyncio.timeout(_LOG_TIMEOUT_SECONDS):
                return await super().fetch_container_logs_before_current_sec(pod, container_name, since_time)
        # Whatever the cause, the pod can be followed without its log, and the next copy begins where this one did.
        except Exception as error:  # noqa: BLE001
            self.log.warning("the pod's log cannot be copied now: %s", str(error) or type(error).__name__)
            return since_time


class PodTrigger(KubernetesPodTrigger):  # type: ignore[misc]
    """Fire when the pod's container ended, or when its node is lost; the task then reads the pod's status itself.

    Args:
        max_queue_seconds: For how long the pod may wait behind scheduling gates.
    """

    def __init__(self, *, max_queue_seconds: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_queue_seconds = max_queue_seconds

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
            max_queue_seconds=task.max_queue_seconds,
        )

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return this class's path for the triggerer; Airflow's method would return that of its own class."""
        arguments = {**super().serialize()[1], "max_queue_seconds": self.max_queue_seconds}
        return f"{__name__}.{type(self).__name__}", arguments

    @cached_property
    def hook(self) -> ObservingHook:
        """The connection to the API."""
        return ObservingHook(
            conn_id=self.kubernetes_conn_id,
            in_cluster=self.in_cluster,
            config_dict=self.config_dict,
            cluster_context=self.cluster_context,
            connection_extras=self.connection_extras,
        )

    @cached_property
    def pod_manager(self) -> PodManager:
        """The reader of the pod's log."""
        return PodManager(async_hook=self.hook)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait for the pod; yield an event that has what was last seen of it."""
        async with contextlib.aclosing(super().run()) as events:
            async for event in events:
                yield TriggerEvent({**event.payload, **self.hook.observation.as_event_fields()})

    def define_pod_container_state(self, pod: Any) -> ContainerState:
        """Return the container's state; failed where its node is lost."""
        return ContainerState.FAILED if pod_status.lost_node(pod) else super().define_pod_container_state(pod)

    async def _wait_for_pod_start(self) -> ContainerState:
        """Wait until the pod may be scheduled; then until it starts, for which the startup timeout counts."""
        pod = await self._get_pod()
        if pod_status.is_gated(pod):
            self.log.info("pod %s waits behind its scheduling gates for its turn", self.pod_name)
        while pod_status.is_gated(pod):
            waited = datetime.now(UTC) - pod.metadata.creation_timestamp
            if waited.total_seconds() > self.max_queue_seconds:
                raise PodLaunchTimeoutException("Pod waited too long behind its scheduling gates.")
            await asyncio.sleep(self.startup_check_interval)
            pod = await self._get_pod()
        return await super()._wait_for_pod_start()

    async def _get_pod(self) -> Any:
        """Return the pod; copy its log at once where the cluster is ending it, since the log goes with the pod."""
        pod = await super()._get_pod()
        if pod_status.disruption(pod):
            self.last_log_time: Any = await self.pod_manager.fetch_container_logs_before_current_sec(
                pod, self.base_container_name, self.last_log_time
            )
        return pod
