"""A command of `qlora-retrain` in a pod, with the service account of the step `publish`; see `publish_command.py`."""

from __future__ import annotations

import hashlib
import math
import time
from datetime import timedelta
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from qlora_retrain.core import graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, TryAgain
from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator
from qlora_retrain.runtimes.airflow.publish_command import CLI_MODULE, MOVE, with_reason_first
from qlora_retrain.runtimes.kubernetes import pod_api, pod_spec, pod_status
from qlora_retrain.runtimes.kubernetes.pod_status import PodEnding

_POLL_SECONDS = 1.0


class KubernetesCommand(KubernetesStepOperator):
    """A pod like that of `publish`, which the task follows to its end without the triggerer."""

    command = MOVE
    # Set apart the pods of one DAG run, and say what they do.
    suffix = ""
    label: str | None = None

    def run_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> Ending:
        """Create the pod, or follow the one of an earlier try of the same DAG run; copy its log and delete it."""
        self.prepare_command(arguments, run_id, timeout)
        try:
            ending = self._wait(self._create_or_follow())
            output = self._copy_log(None)
            self._pod_api.delete()
        except HTTPError as error:
            raise TryAgain(f"the Kubernetes API does not answer: {error}", cause=Cause.THROTTLED) from error
        return with_reason_first(ending.as_ending(self.command, log_lines=output.last_lines if output else ""))

    def prepare_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> None:
        """Fill in the pod's name, command, labels and deadline; everything else is as in the pod of `publish`."""
        self.active_deadline_seconds = math.ceil(timeout.total_seconds())
        key = hashlib.sha256(f"{run_id}{self.suffix}".encode()).hexdigest()
        self.name = pod_spec.pod_name(self.command, key, run_id)
        # Kubernetes replaces `$(NAME)` in arguments by a variable of the container, and `$$` by `$`.
        self.arguments = ["python", "-m", CLI_MODULE, *(argument.replace("$", "$$") for argument in arguments)]
        self.labels = {**pod_spec.labels(self.label or self.step, self.line, self.profile), "qlora-retrain.run": run_id}
        # With `auto` no plan says what it needs, so it gets the profile's.
        if self.runtime.memory_gib == "auto" or self.profile.pod(graph.step(self.step)).memory_gib == "auto":
            runtime = self.runtime.model_copy(update={"memory_gib": None})
            self.container_resources = pod_spec.resource_requirements(
                graph.step(self.step), self.profile, runtime, self.profile.pod(graph.step(self.step)).max_memory_gib
            )
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)
        self.pod = self.pod_request_obj  # the pod that `on_kill` deletes

    def _create_or_follow(self) -> Any:
        try:
            return self._find_pod_to_follow() or self._pod_api.create(self.pod_request_obj)
        except ApiException as error:
            pod_api.raise_for_rejected_pod(self.namespace, error)

    def _wait(self, pod: Any) -> PodEnding:
        """Return how the pod ended; a pod that cannot start has ended."""
        started = time.monotonic()
        while (ending := pod_status.read_ending(pod) or pod_status.lost_node(pod)) is None:
            ending = pod_status.startup_failure(pod)
            patience = self.startup_timeout_seconds + (self.max_queue_seconds if pod_status.is_gated(pod) else 0)
            if ending is None and time.monotonic() - started > patience and not pod_status.is_running(pod):
                warnings = self._pod_api.events(pod.metadata.uid, selector="type=Warning")
                ending = pod_status.startup_timeout(pod, warnings, "it waits for its start")
            if ending is not None:
                break
            time.sleep(_POLL_SECONDS)
            try:
                pod = self._pod_api.read()
            except ApiException as error:
                self.log.warning("the pod cannot be read now: %s", error.reason)
                continue
            if pod is None:
                return pod_status.POD_IS_GONE
        return ending
