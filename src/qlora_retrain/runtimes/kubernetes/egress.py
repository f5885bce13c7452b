"""The network policies that let the steps' pods out, rendered from the cluster's profile.

`manifests/base/network.yaml` closes everything and opens DNS; these open what the profile lists, and nothing else.

Command: `qlora-retrain egress PROFILE`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_retrain.runtimes.docker import container_spec

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile, Destination

# The label of every pod that Airflow starts, as `pod_spec.LABELS`; Kubeflow labels its pods itself, and an overlay
# replaces this selector.
_SELECTOR = {"matchLabels": {"app.kubernetes.io/name": "qlora-retrain"}}
# Of the pods of mirrors, in place of a step's name.
MIRROR_LABEL = "mirror"


def network_policies(profile: ClusterProfile) -> list[dict[str, Any]]:
    """Render a policy for each destination of the profile; those of mirrors are for their pods alone."""
    mirror_selector = {"matchLabels": {**_SELECTOR["matchLabels"], container_spec.STEP_LABEL: MIRROR_LABEL}}
    return [
        *_policies(profile.egress, "egress", _SELECTOR),
        *_policies(profile.mirror_egress, "mirror-to", mirror_selector),
    ]


def _policies(destinations: Iterable[Destination], prefix: str, selector: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"{prefix}-{destination.name}"},
            "spec": {
                "podSelector": selector,
                "policyTypes": ["Egress"],
                "egress": [
                    {
                        "to": _peers(destination),
                        "ports": [{"protocol": "TCP", "port": port} for port in destination.ports],
                    }
                ],
            },
        }
        for destination in destinations
    ]


def _peers(destination: Destination) -> list[dict[str, Any]]:
    if destination.namespace is None:
        return [{"ipBlock": {"cidr": block}} for block in destination.blocks]
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": destination.namespace}}
    return [{"namespaceSelector": namespace, "podSelector": {"matchLabels": destination.pods}}]
