"""Every step's pod as Airflow's operator would send it, for no run: for checks that need neither Airflow nor a plan.

A test compares these manifests with the operator's own, field by field. They differ only in the names of the run.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kubernetes.client import ApiClient
from kubernetes.client import models as k8s

from qlora_retrain.core import graph
from qlora_retrain.core.graph import Step
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.runtimes.kubernetes import pod_spec

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig

_RUN_ID = "20000101T000000Z-000000000000"


@dataclass(frozen=True, slots=True)
class StepPod:
    """The largest pod that a step of a line may get.

    Attributes:
        step: The step.
        manifest: The pod as the API takes it.
        gpus: The GPUs that it requests.
    """

    step: Step
    manifest: dict[str, Any]
    gpus: int

    @property
    def spec(self) -> dict[str, Any]:
        """The pod's spec."""
        spec: dict[str, Any] = self.manifest["spec"]
        return spec

    @property
    def account(self) -> str:
        """The service account that the pod runs as."""
        return str(self.spec.get("serviceAccountName") or "default")

    @property
    def resources(self) -> dict[str, dict[str, str]]:
        """The requests and limits of its only container."""
        (container,) = self.spec["containers"]
        resources: dict[str, dict[str, str]] = container["resources"]
        return resources


def step_pods(profile: ClusterProfile, line: str, runtime: RuntimeConfig) -> list[StepPod]:
    """Render the pod of each step, with the memory to which its tries may grow."""
    return [
        StepPod(step, _manifest(step, line, profile, runtime, largest_memory_gib(step, profile, runtime)), gpus)
        for step in graph.STEPS
        for gpus in [profile.gpus(step)]
    ]


def largest_memory_gib(step: Step, profile: ClusterProfile, runtime: RuntimeConfig) -> float | None:
    """Return the most memory in GiB that a try of a step gets; None: no limit of its own."""
    first_gib, max_gib = pod_spec.first_memory_gib(step, profile, runtime), profile.pod(step).max_memory_gib
    return max(filter(None, (first_gib, max_gib)), default=None)


def _manifest(
    step: Step, line: str, profile: ClusterProfile, runtime: RuntimeConfig, memory_gib: float | None
) -> dict[str, Any]:
    arguments = pod_spec.operator_arguments(step, line, profile, runtime)
    container = k8s.V1Container(
        name=pod_spec.CONTAINER_NAME,
        image=arguments["image"],
        args=container_spec.step_command(step.name, f"file:///runs/{_RUN_ID}/plan.json"),
        env=arguments["env_vars"],
        resources=pod_spec.resource_requirements(step, profile, runtime, memory_gib),
        security_context=arguments["container_security_context"],
        termination_message_policy=arguments["termination_message_policy"],
        volume_mounts=arguments["volume_mounts"],
    )
    timeout = deadlines.task_timeout(step.name, runtime.max_step_hours)
    spec = k8s.V1PodSpec(
        active_deadline_seconds=math.ceil(timeout.total_seconds()),
        automount_service_account_token=arguments["automount_service_account_token"],
        containers=[container],
        image_pull_secrets=arguments["image_pull_secrets"] or None,
        node_selector=arguments["node_selector"] or None,
        priority_class_name=arguments["priority_class_name"],
        restart_policy="Never",
        security_context=arguments["security_context"],
        service_account_name=arguments["service_account_name"],
        termination_grace_period_seconds=arguments["termination_grace_period"],
        tolerations=arguments["tolerations"] or None,
        volumes=arguments["volumes"],
    )
    metadata = k8s.V1ObjectMeta(
        # No pod of a run has this name: a dry run is refused where the name is taken.
        name=pod_spec.pod_name(step.name, uuid.uuid4().hex, _RUN_ID),
        namespace=arguments["namespace"],
        labels={**arguments["labels"], "qlora-retrain.run": _RUN_ID},
        annotations=arguments["annotations"],
    )
    pod = k8s.V1Pod(api_version="v1", kind="Pod", metadata=metadata, spec=spec)
    manifest: dict[str, Any] = ApiClient().sanitize_for_serialization(pod)
    return manifest
