"""What the doctor examines: a namespace, its API, the profile of its pods, and the pods themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_retrain.runtimes.kubernetes.doctor.cluster_api import ClusterApi
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What is examined.

    Attributes:
        api: The cluster.
        profile: The cluster's profile.
        pods: The largest pods of the steps.
    """

    api: ClusterApi
    profile: ClusterProfile
    pods: Sequence[StepPod]

    @property
    def namespace(self) -> str:
        """Where the pods are."""
        return self.profile.namespace

    def path(self, resource: str, group: str = "", version: str = "v1") -> str:
        """Return the path of a kind of objects in the namespace."""
        prefix = f"/apis/{group}/{version}" if group else f"/api/{version}"
        return f"{prefix}/namespaces/{self.namespace}/{resource}"
