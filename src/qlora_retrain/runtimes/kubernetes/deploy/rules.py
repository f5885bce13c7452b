"""The rules that a deployment must keep before it is applied; each yields the faults that it finds.

A fault is a contradiction among the files: what the profile names and the overlay does not create, pods that the quota
could not hold, permissions that Airflow would miss. What only a person can do is in `by_hand.py`.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core import graph, images
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.kubernetes import egress, pod_security, quota_rules
from qlora_retrain.runtimes.kubernetes.deploy.overlay import Overlay
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.line import LineConfig

Document = dict[str, Any]
_ENFORCE = "pod-security.kubernetes.io/enforce"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What would be applied, and what would run there.

    Attributes:
        overlay: The manifests.
        profile: The cluster's profile; its `require_digests` is off, because `image_faults` checks it.
        profile_path: Its file.
        requires_digests: What the file says.
        pods: The largest pods of the steps.
        lines: The lines that are checked with it.
        kubernetes: The version of the schemas, e.g. `1.32`.
    """

    overlay: Overlay
    profile: ClusterProfile
    profile_path: Path
    requires_digests: bool
    pods: Sequence[StepPod]
    kubernetes: str
    lines: Sequence[LineConfig] = field(default=())


def schema_faults(deployment: Deployment) -> Iterator[Finding]:
    """Every document and every pod is what the API server's schema says; a field that it does not know is refused."""
    kubernetes_validate = _import_validator(deployment.kubernetes)
    for document in (*deployment.overlay.documents, *(pod.manifest for pod in deployment.pods)):
        where = f"{document['kind']} {document['metadata']['name']}"
        try:
            kubernetes_validate.validate(document, deployment.kubernetes, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path) or "the document"
            expected = f"what Kubernetes {deployment.kubernetes} takes"
            yield fault("schemas", f"{where}, {path}", expected, error.message, "correct the manifest or the profile")
        except kubernetes_validate.SchemaNotFoundError:
            expected = f"a kind of Kubernetes {deployment.kubernetes}"
            remedy = "correct kind and apiVersion, or check this object yourself"
            yield fault("schemas", where, expected, document["apiVersion"], remedy)


def security_faults(deployment: Deployment) -> Iterator[Finding]:
    """The namespace enforces a Pod Security Standard, and every pod satisfies `restricted`."""
    level = "baseline" if deployment.overlay.is_kubeflow else "restricted"
    for namespace in deployment.overlay.of_kind("Namespace"):
        where = f"Namespace {namespace['metadata']['name']}, label {_ENFORCE}"
        labels = namespace["metadata"].get("labels") or {}
        if labels.get(_ENFORCE) not in {level, "restricted"}:
            remedy = "set the label: without it the namespace takes privileged pods"
            yield fault("pod security", where, level, str(labels.get(_ENFORCE, "no label")), remedy)
        if f"{_ENFORCE}-version" not in labels:
            remedy = "pin the version, so that an upgrade of the cluster does not refuse pods that ran before"
            yield fault("pod security", f"{where}-version", "a version, e.g. v1.30", "no label", remedy)
    for pod in deployment.pods:
        if violations := pod_security.restricted(pod.manifest):
            remedy = "this is how the operator renders the pod; report it as a fault of this project"
            yield fault("pod security", f"pod of {pod.step.name}", "restricted", "; ".join(violations), remedy)


def image_faults(deployment: Deployment) -> Iterator[Finding]:
    """Images are named by digest where the profile says so, and then the cluster refuses every tag too."""
    if not deployment.requires_digests:
        return
    for name in ("light_image", "train_image"):
        reference = getattr(deployment.profile, name)
        if not images.has_digest(reference):
            remedy = "push the image and write the digest that the registry prints (docs/deploy.md, step 2)"
            yield fault("images", f"{deployment.profile_path}, {name}", "name@sha256:<64 hex>", reference, remedy)

    denying = {
        binding["spec"]["policyName"]
        for binding in deployment.overlay.of_kind("ValidatingAdmissionPolicyBinding")
        if "Deny" in binding["spec"].get("validationActions", ())
    }
    # The rule is recognised by what it says of an image's name.
    rules = {
        policy["metadata"]["name"]
        for policy in deployment.overlay.of_kind("ValidatingAdmissionPolicy")
        if any("@sha256:" in rule["expression"] for rule in policy["spec"]["validations"])
    }
    if not deployment.overlay.is_kubeflow and not rules & denying:
        expected = "a ValidatingAdmissionPolicy for digests, and a binding of it that denies"
        remedy = "add manifests/overlays/production/digests.yaml to the overlay's resources"
        yield fault("images", str(deployment.overlay.folder), expected, "none", remedy)


def quota_faults(deployment: Deployment) -> Iterator[Finding]:
    """The largest pod of each step, and a full pool of them, fit the namespace's quota and limits."""
    quotas, limit_ranges = (deployment.overlay.of_kind(kind) for kind in ("ResourceQuota", "LimitRange"))
    yield from quota_rules.findings(deployment.pods, quotas, limit_ranges)
    if deployment.profile.gpu_pool and not deployment.overlay.is_kubeflow:
        resource = deployment.profile.gpu_resource
        yield from quota_rules.full_pool_findings(deployment.pods, quotas, limit_ranges, resource)


def node_faults(deployment: Deployment) -> Iterator[Finding]:
    """The profile says on which nodes GPU pods run, or which taints they tolerate."""
    gpu = deployment.profile.gpu
    if deployment.profile.gpu_resource and not gpu.node_selector and not gpu.tolerations:
        remedy = "state the labels of the GPU nodes, and their taints (kubectl describe nodes)"
        expected = "node_selector or tolerations"
        yield fault("nodes", f"{deployment.profile_path}, gpu", expected, "neither", remedy)


def network_faults(deployment: Deployment) -> Iterator[Finding]:
    """Everything is closed, and exactly what the profile lists is open."""
    overlay, path = deployment.overlay, deployment.profile_path
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in overlay.of_kind("NetworkPolicy")}
    if {"Ingress", "Egress"} - {
        kind for spec in policies.values() if spec["podSelector"] == {} for kind in spec.get("policyTypes", ())
    }:
        expected = "a NetworkPolicy that closes Ingress and Egress for every pod"
        remedy = "keep manifests/base/network.yaml in the overlay"
        yield fault("network", str(overlay.folder), expected, "none", remedy)

    rendered = {p["metadata"]["name"]: p["spec"] for p in egress.network_policies(deployment.profile)}
    target = shlex.quote(f"{overlay.folder}/egress.yaml")
    remedy = f"run: qlora-retrain egress {shlex.quote(str(path))} > {target}"
    if not rendered:
        yield fault("network", f"{path}, egress", "at least the store", "nothing", "list what the pods connect to")
    for name in sorted(rendered.keys() | {name for name in policies if name.startswith("egress-")}):
        where = f"NetworkPolicy {name}"
        if name not in policies:
            yield fault("network", where, f"the destination of {path}", "no such policy in the overlay", remedy)
        elif name not in rendered:
            yield fault("network", where, f"a destination in {path}", "none of this name", remedy)
        # The overlay for Kubeflow replaces the selector.
        elif policies[name]["egress"] != rendered[name]["egress"]:
            yield fault("network", where, f"what {path} lists", "other addresses or ports", remedy)


def line_faults(deployment: Deployment) -> Iterator[Finding]:
    """Lines say what cannot be decided where their plan is made, and take as many GPUs as the profile gives."""
    for config in deployment.lines:
        for section in (step.section for step in graph.STEPS if step.gpus):
            device = getattr(config, section).device
            if device == "auto" and deployment.profile.gpu_resource:
                remedy = f"set {section}.device: cuda: auto is decided where the plan is made, and Airflow has no GPU"
                yield fault("lines", f"line {config.line}, {section}.device", "cuda", device, remedy)
        if config.train.num_processes != deployment.profile.train_gpus and deployment.profile.gpu_resource:
            where, actual = f"line {config.line}, train.num_processes", str(config.train.num_processes)
            expected = f"{deployment.profile.train_gpus}, the profile's train_gpus"
            yield fault("lines", where, expected, actual, "let both be the same")


def _import_validator(version: str) -> Any:
    """Import the schemas.

    Raises:
        UsageError: If they are not installed in this environment, or have not got this version.
    """
    try:
        validator = importlib.import_module("kubernetes_validate.utils")
    except ModuleNotFoundError as error:
        raise UsageError(
            "kubernetes-validate is not installed in this environment, and it has Kubernetes' schemas; run this in the "
            "environment that `make setup` makes, or install that package"
        ) from error
    versions = [validator.major_minor(text) for text in validator.all_versions()]
    if version not in versions:
        raise UsageError(f"--kubernetes {version}: expected one of {', '.join(versions)}")
    return validator
