"""A step as a pod: what an Airflow task requests from the cluster, and how one try's pod changes the next one's.

`kubernetes.py` has the pod's life: how it is created, followed and judged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

from qlora_retrain.core import graph
from qlora_retrain.runtimes.airflow.operators import StepOperator
from qlora_retrain.runtimes.airflow.pod_defaults import OPERATOR_DEFAULTS
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.runtimes.kubernetes import pod_size, pod_spec, pod_status, retries

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig
    from qlora_retrain.pipeline.plan import Plan

_POLL_INTERVAL_SECONDS = 5


class PodStepOperator(StepOperator, KubernetesPodOperator):  # type: ignore[misc]
    """One step of the graph and the pod that it requests.

    Args:
        step: The step's name.
        line: The line's name.
        runtime: What the platform says for the line.
        profile: The cluster's profile.
    """

    def __init__(self, *, step: str, line: str, runtime: RuntimeConfig, profile: ClusterProfile, **kwargs: Any) -> None:
        super().__init__(
            step=step,
            line=line,
            **pod_spec.operator_arguments(graph.step(step), line, profile, runtime),
            poll_interval=_POLL_INTERVAL_SECONDS,
            **{**OPERATOR_DEFAULTS, **kwargs},
        )
        self.runtime, self.profile = runtime, profile

    @property
    def max_queue_seconds(self) -> float:
        """For how long the pod may wait behind scheduling gates."""
        return self.runtime.max_queue_hours * 3600

    def prepare_pod(self, plan_uri: str, key: str, run_id: str) -> None:
        """Fill in what depends on the run: the pod's name, its command, its labels and its deadline."""
        self.active_deadline_seconds = math.ceil(self.execution_timeout.total_seconds())
        self.name = pod_spec.pod_name(self.step, key, run_id)
        # Set after Airflow rendered its templates, so a `{{` in a URI is never evaluated.
        self.arguments = [*container_spec.step_command(self.step, plan_uri), *self.step_arguments]
        self.labels = {**pod_spec.labels(self.step, self.line, self.profile), "qlora-retrain.run": run_id}
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)
        self.pod = self.pod_request_obj  # the pod that `on_kill` deletes

    def size_pod(self, plan: Plan) -> None:
        """Give the pod what the planner says of this run's step, where its memory or disk is `auto`."""
        step = graph.step(self.step)
        if not pod_size.follows_plan(step, self.profile, self.runtime):
            return
        self.runtime, failure = pod_size.with_numbers(plan, step, self.profile, self.runtime)
        if failure:
            self.log.warning("the pod's size is not estimated, so it gets the profile's: %s", failure)
        arguments = pod_spec.operator_arguments(step, self.line, self.profile, self.runtime)
        self.container_resources, self.volumes = arguments["container_resources"], arguments["volumes"]
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)

    def learn_from(self, pod: Any) -> None:
        """Set the next pod's memory and its annotations by how this one ended."""
        # The operator built its request before this pod was known, so the request is built again at the end.
        step, ending = graph.step(self.step), pod_status.read_ending(pod)
        memory_gib = retries.next_memory_gib(pod, ending, step, self.profile, self.runtime)
        self.container_resources = pod_spec.resource_requirements(step, self.profile, self.runtime, memory_gib)
        self.annotations = {**pod_spec.ANNOTATIONS, **retries.death_annotations(pod, ending, memory_gib)}
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)
