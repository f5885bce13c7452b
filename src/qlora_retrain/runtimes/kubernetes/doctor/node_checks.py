"""Whether some node takes each step's pod: its labels, its taints, and what it can give to one pod."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from qlora_retrain.runtimes.kubernetes.doctor.cluster_api import refusal
from qlora_retrain.runtimes.kubernetes.doctor.cluster_view import ClusterView
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod

Document = dict[str, Any]
_GROW = "if the group of nodes grows from none, start one of them once and run the doctor again"


def check_nodes(cluster: ClusterView) -> Iterator[Finding]:
    """Each pod fits a node as it would be empty."""
    answer, nodes = cluster.api.items("/api/v1/nodes")
    yield from refusal("nodes", "the cluster's nodes", answer)
    if not answer.is_success:
        return
    for pod in cluster.pods:
        yield from _check_pod(pod, nodes)


def _check_pod(pod: StepPod, nodes: Sequence[Document]) -> Iterator[Finding]:
    selector = pod.spec.get("nodeSelector") or {}
    where = f"the pod of {pod.step.name}"
    labelled = [node for node in nodes if selector.items() <= (node["metadata"].get("labels") or {}).items()]
    if not labelled:
        labels = ", ".join(f"{key}={value}" for key, value in sorted(selector.items())) or "any label"
        remedy = f"correct node_selector in the profile, or label the nodes; {_GROW}"
        yield fault("nodes", where, f"a node with {labels}", f"none among {len(nodes)} nodes", remedy)
        return

    taints = {node["metadata"]["name"]: _hostile_taints(pod, node) for node in labelled}
    open_nodes = [node for node in labelled if not taints[node["metadata"]["name"]]]
    if not open_nodes:
        actual = (
            f"taints on all {len(labelled)} nodes with its labels: {', '.join(sorted(set().union(*taints.values())))}"
        )
        yield fault("nodes", where, "a node whose taints it tolerates", actual, "add tolerations to the profile")
        return

    requests = pod.resources["requests"]
    short = [_shortages(requests, node) for node in open_nodes]
    if all(short):
        # The node that lacks the least is the one that was meant.
        _, least = min((len(shortages), shortages) for shortages in short)
        actual = f"at best a node with {', '.join(least)}"
        expected = "a node with " + ", ".join(f"{name} {text}" for name, text in requests.items())
        remedy = f"lower cpus, memory_gib, max_memory_gib or disk_gib in the profile, or add larger nodes; {_GROW}"
        yield fault("nodes", where, expected, actual, remedy)


def _hostile_taints(pod: StepPod, node: Document) -> set[str]:
    """Return the taints of a node that keep the pod away."""
    spec = node.get("spec") or {}
    taints = [taint for taint in spec.get("taints") or () if taint["effect"] in ("NoSchedule", "NoExecute")]
    return {
        f"{taint['key']}={taint.get('value', '')}:{taint['effect']}"
        for taint in taints
        if not any(_tolerates(toleration, taint) for toleration in pod.spec.get("tolerations") or ())
    }


def _tolerates(toleration: Document, taint: Document) -> bool:
    if toleration.get("effect") not in (None, taint["effect"]) or toleration.get("key") not in (None, taint["key"]):
        return False
    return bool(
        toleration.get("operator", "Equal") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    )


def _shortages(requests: dict[str, str], node: Document) -> list[str]:
    """Return what a node could not give, even to this pod alone, with what it has."""
    allocatable = (node.get("status") or {}).get("allocatable") or {}
    return [
        f"{name} {allocatable.get(name, '0')}"
        for name, text in requests.items()
        if parse_quantity(text) > parse_quantity(allocatable.get(name, "0"))
    ]
