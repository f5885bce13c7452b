"""Whether pods fit the ResourceQuota and the LimitRange of a namespace, by the API server's own arithmetic.

Offline the objects come from the manifests, in the cluster from the API; the rules are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from qlora_retrain.runtimes.kubernetes.findings import Finding, fault
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod

Document = dict[str, Any]
CHECK = "quota"
# A quota of these refuses every container that neither states them nor gets them from a LimitRange.
_MUST_BE_STATED = {f"{side}.{resource}" for side in ("requests", "limits") for resource in ("cpu", "memory")}
_RAISE_QUOTA = "raise it in manifests/base/limits.yaml, or lower the profile's max_memory_gib, cpus or disk_gib"


def findings(
    pods: Sequence[StepPod], quotas: Sequence[Document], limit_ranges: Sequence[Document]
) -> Iterator[Finding]:
    """Yield a fault for each pod and resource that the namespace would refuse."""
    limits = [
        item for limit_range in limit_ranges for item in limit_range["spec"]["limits"] if item["type"] == "Container"
    ]
    for pod in pods:
        usage = pod_usage(pod, limits)
        for quota in quotas:
            yield from _quota_findings(pod, usage, quota)
        for item in limits:
            yield from _limit_findings(pod, usage, item)


def full_pool_findings(
    pods: Sequence[StepPod], quotas: Sequence[Document], limit_ranges: Sequence[Document], gpu_resource: str | None
) -> Iterator[Finding]:
    """Yield a fault where a full pool of GPU pods, with a pod without a GPU beside it, exceeds a quota."""
    limits = [item for document in limit_ranges for item in document["spec"]["limits"] if item["type"] == "Container"]
    for quota in quotas:
        hard = quota["spec"]["hard"]
        gpus = int(hard.get(f"requests.{gpu_resource}", 0))
        sums: dict[str, tuple[Decimal, str]] = {}
        for large in (pod for pod in pods if pod.gpus):
            for small in (pod for pod in pods if not pod.gpus):
                in_pool, beside = pod_usage(large, limits), pod_usage(small, limits)
                for name in hard:
                    total = gpus // large.gpus * _amount(in_pool, name) + _amount(beside, name)
                    text = f"{gpus // large.gpus} pods of {large.step.name} and one of {small.step.name}"
                    sums[name] = max(sums.get(name, (Decimal(0), "")), (total, text))
        for name, (total, text) in sums.items():
            if gpus and total > parse_quantity(hard[name]):
                where = f"ResourceQuota {quota['metadata']['name']}, {name}"
                yield fault(CHECK, where, f"at least {_readable(name, total)} for {text}", hard[name], _RAISE_QUOTA)


def pod_usage(pod: StepPod, limits: Sequence[Document]) -> dict[str, str]:
    """Return what an admitted pod counts against a quota, by the quota's names for it.

    Args:
        pod: The pod.
        limits: The items for containers of the namespace's LimitRanges, whose defaults the API server adds.
    """
    stated, own_limits = pod.resources, pod.resources.get("limits", {})
    defaults = _merged(item.get("default", {}) for item in limits)
    default_requests = {**defaults, **_merged(item.get("defaultRequest", {}) for item in limits)}
    admitted = {
        "limits": {**defaults, **own_limits},
        "requests": {**default_requests, **own_limits, **stated.get("requests", {})},
    }
    usage = {f"{side}.{name}": text for side, amounts in admitted.items() for name, text in amounts.items()}
    # Without a side, a quota means the requests.
    usage |= {name: text for name, text in admitted["requests"].items() if name in ("cpu", "memory")}

    claims = [v["ephemeral"]["volumeClaimTemplate"]["spec"] for v in pod.spec["volumes"] if "ephemeral" in v]
    for claim in claims:
        usage |= {"requests.storage": claim["resources"]["requests"]["storage"], "persistentvolumeclaims": "1"}
    return {**usage, "pods": "1"}


def _quota_findings(pod: StepPod, usage: dict[str, str], quota: Document) -> Iterator[Finding]:
    name, hard = quota["metadata"]["name"], quota["spec"]["hard"]
    for resource, text in hard.items():
        where = f"ResourceQuota {name}, {resource}"
        if resource in _MUST_BE_STATED | {"cpu", "memory"} and resource not in usage:
            remedy = "set it in the profile (cpus, memory_gib), or add a default to the LimitRange"
            yield fault(CHECK, where, f"that the pod of {pod.step.name} states it", "none", remedy)
        if _amount(usage, resource) > parse_quantity(text):
            expected = f"at least {usage[resource]}, as the largest pod of {pod.step.name} counts"
            yield fault(CHECK, where, expected, text, _RAISE_QUOTA)


def _limit_findings(pod: StepPod, usage: dict[str, str], item: Document) -> Iterator[Finding]:
    for resource, text in item.get("max", {}).items():
        amount = usage.get(f"limits.{resource}")
        if amount is not None and parse_quantity(amount) > parse_quantity(text):
            expected = f"a maximum of at least {amount}, as the pod of {pod.step.name} may get"
            remedy = "raise the LimitRange's max in manifests/base/limits.yaml, or lower max_memory_gib in the profile"
            yield fault(CHECK, f"LimitRange, {resource}", expected, text, remedy)


def _amount(usage: dict[str, str], name: str) -> Decimal:
    return Decimal(parse_quantity(usage.get(name, "0")))


def _merged(amounts: Iterable[dict[str, str]]) -> dict[str, str]:
    return {name: text for item in amounts for name, text in item.items()}


def _readable(name: str, amount: Decimal) -> str:
    """Write a sum as the manifests do: bytes in GiB, everything else as a number."""
    in_bytes = any(word in name for word in ("memory", "storage"))
    return f"{amount / 2**30:.0f}Gi" if in_bytes and amount >= 2**30 else f"{amount.normalize():f}"
