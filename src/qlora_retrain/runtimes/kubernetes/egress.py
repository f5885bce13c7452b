"""The network policies that let the steps' pods out, rendered from the cluster's profile.

`manifests/base/network.yaml` closes everything and opens DNS; these open what the profile lists, and nothing else.

The pods of messages are in Airflow's namespace, where nothing is closed. One policy selects them, and closes for them
what it does not open.

Command: `qlora-retrain egress PROFILE [--messages]`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_retrain.runtimes.docker import container_spec

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.pod_network import Destination, MessagePods

# The label of every pod that Airflow starts, as `pod_spec.LABELS`; Kubeflow labels its pods itself, and an overlay
# replaces this selector.
_SELECTOR = {"matchLabels": {"app.kubernetes.io/name": "qlora-retrain"}}
# Of the pods of mirrors and of messages, in place of a step's name.
MIRROR_LABEL = "mirror"
MESSAGE_LABEL = "message"
_DNS = {
    "to": [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
    ],
    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
}


def network_policies(profile: ClusterProfile) -> list[dict[str, Any]]:
    """Render a policy for each destination of the profile; those of mirrors are for their pods alone."""
    mirror_selector = {"matchLabels": {**_SELECTOR["matchLabels"], container_spec.STEP_LABEL: MIRROR_LABEL}}
    return [
        *_policies(profile.egress, "egress", _SELECTOR),
        *_policies(profile.mirror_egress, "mirror-to", mirror_selector),
    ]


def message_policy(pods: MessagePods) -> dict[str, Any]:
    """Render the policy of the pods of messages: DNS and what the profile lists for them, and nothing else."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "qlora-retrain-messages", "namespace": pods.namespace},
        "spec": {
            "podSelector": {"matchLabels": {container_spec.STEP_LABEL: MESSAGE_LABEL}},
            "policyTypes": ["Ingress", "Egress"],
            "egress": [_DNS, *(_rule(destination) for destination in pods.egress)],
        },
    }


def _policies(destinations: Iterable[Destination], prefix: str, selector: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"{prefix}-{destination.name}"},
            "spec": {
                "podSelector": selector,
                "policyTypes": ["Egress"],
                "egress": [_rule(destination)],
            },
        }
        for destination in destinations
    ]


def _rule(destination: Destination) -> dict[str, Any]:
    ports = [{"protocol": "TCP", "port": port} for port in destination.ports]
    return {"to": _peers(destination), "ports": ports}


def _peers(destination: Destination) -> list[dict[str, Any]]:
    if destination.namespace is None:
        return [{"ipBlock": {"cidr": block}} for block in destination.blocks]
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": destination.namespace}}
    return [{"namespaceSelector": namespace, "podSelector": {"matchLabels": destination.pods}}]
