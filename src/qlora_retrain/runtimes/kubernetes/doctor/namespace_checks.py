"""What the namespace holds: quota and limits, network policies, the claim of the cache, images, mounted secrets."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_retrain.core import images
from qlora_retrain.runtimes.kubernetes import egress, quota_rules
from qlora_retrain.runtimes.kubernetes.doctor.cluster_api import refusal
from qlora_retrain.runtimes.kubernetes.doctor.cluster_view import ClusterView
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault, unknown


def check_quota(cluster: ClusterView) -> Iterator[Finding]:
    """The quota and the limits hold the largest pod of each step."""
    answer, quotas = cluster.api.items(cluster.path("resourcequotas"))
    yield from refusal("quota", f"the quota of {cluster.namespace}", answer)
    answer, limit_ranges = cluster.api.items(cluster.path("limitranges"))
    yield from refusal("quota", f"the limits of {cluster.namespace}", answer)
    yield from quota_rules.findings(cluster.pods, quotas, limit_ranges)


def check_network(cluster: ClusterView) -> Iterator[Finding]:
    """The cluster has the policies that the profile renders; whether its network plugin enforces them is not seen."""
    answer, policies = cluster.api.items(cluster.path("networkpolicies", "networking.k8s.io"))
    yield from refusal("network", f"the network policies of {cluster.namespace}", answer)
    if not answer.is_success:
        return
    specs = {policy["metadata"]["name"]: policy["spec"] for policy in policies}
    for rendered in egress.network_policies(cluster.profile):
        name = rendered["metadata"]["name"]
        if specs.get(name, {}).get("egress") != rendered["spec"]["egress"]:
            actual = "other addresses or ports" if name in specs else "no such policy"
            remedy = "render it (qlora-retrain egress PROFILE) and apply the overlay"
            yield fault("network", f"NetworkPolicy {name}", "what the profile lists", actual, remedy)


def check_storage(cluster: ClusterView) -> Iterator[Finding]:
    """The claim that the pods share exists and is not lost."""
    claim = cluster.profile.cache_claim
    if claim is None:
        return
    where = f"PersistentVolumeClaim {claim} in {cluster.namespace}"
    answer = cluster.api.get(f"{cluster.path('persistentvolumeclaims')}/{claim}")
    if answer.status == 404:
        yield fault("storage", where, "the claim of the cache", "none", "apply the overlay, or set cache_claim: null")
        return
    yield from refusal("storage", where, answer)
    if (answer.document.get("status") or {}).get("phase") == "Lost":
        remedy = "delete the claim and apply the overlay; the cache holds nothing that is not in the store"
        yield fault("storage", where, "Bound, or Pending until the first pod", "Lost", remedy)


def check_images(cluster: ClusterView, requires_digests: bool) -> Iterator[Finding]:
    """Images are named by digest."""
    for name in ("light_image", "train_image"):
        reference = getattr(cluster.profile, name)
        if images.has_digest(reference):
            continue
        if requires_digests:
            remedy = "write the digest that the registry printed after the push (docs/deploy.md, step 2)"
            yield fault("images", f"{name} of the profile", "name@sha256:<64 hex>", reference, remedy)
        else:
            reason = f"{name} is {reference}: a tag can be moved, so nobody knows which image a pod will get"
            yield unknown("images", reason, "name it by digest, and set require_digests: true")


def check_secrets(cluster: ClusterView) -> Iterator[Finding]:
    """Secrets cannot be seen, because the doctor may read none."""
    names = {
        volume["secret"]["secretName"] for pod in cluster.pods for volume in pod.spec["volumes"] if "secret" in volume
    }
    names |= set(cluster.profile.image_pull_secrets)
    if names:
        listed = " ".join(sorted(names))
        reason = f"the doctor may read no secret, so not whether these exist: {listed}"
        yield unknown("secrets", reason, f"kubectl -n {cluster.namespace} get secret {listed}")
