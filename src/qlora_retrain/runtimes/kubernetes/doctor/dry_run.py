"""Ask the API server to create each step's pod without creating it: schemas, admission, Pod Security, quota, accounts.

A dry run passes every admission that a real request passes, and stores nothing. RBAC knows no dry runs, so the doctor's
account may create pods as far as RBAC is concerned; a ValidatingAdmissionPolicy refuses each of its requests that is no
dry run (`manifests/doctor/policy.yaml`).
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_retrain.runtimes import foreign_messages
from qlora_retrain.runtimes.kubernetes import pod_spec
from qlora_retrain.runtimes.kubernetes.doctor.cluster_api import APPLY, Answer
from qlora_retrain.runtimes.kubernetes.doctor.cluster_view import ClusterView
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault, unknown
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod

CHECK = "dry run"


def check_pods(cluster: ClusterView) -> Iterator[Finding]:
    """The cluster would accept every step's pod, as it is."""
    for pod in cluster.pods:
        answer = cluster.api.post(cluster.path("pods"), pod.manifest, dryRun="All")
        yield from _added_containers(pod, answer) if answer.is_success else _refusal(cluster, pod, answer)


def _refusal(cluster: ClusterView, pod: StepPod, answer: Answer) -> Iterator[Finding]:
    where = f"the pod of {pod.step.name} in {cluster.namespace}"
    expected, message = "that the cluster would accept it", answer.message
    if answer.status in (401, 403) and foreign_messages.NOT_PERMITTED.search(message):
        yield unknown(CHECK, f"the doctor may not make dry runs: {message}", APPLY)
    elif answer.status == 403 and foreign_messages.QUOTA_EXCEEDED.search(message):
        yield unknown(CHECK, f"{where}: the quota is in use: {message}", "run the doctor again while no step runs")
    elif answer.status == 403 and foreign_messages.POD_SECURITY.search(message):
        remedy = "the namespace may enforce `restricted`, pinned to v1.30 (manifests/base/namespace.yaml), and no more"
        yield fault("pod security", where, expected, message, remedy)
    elif foreign_messages.NO_DRY_RUN.search(message):
        yield unknown(CHECK, f"{where}: {message}", "ask whoever runs that webhook what it would say to the pod")
    elif answer.status >= 500 or answer.status == 429:
        yield unknown(CHECK, f"{where}: the API failed ({answer.status}): {message}", "run the doctor again")
    else:
        remedy = "the message names the object or the policy: correct the profile, the overlay or that policy"
        yield fault(CHECK, where, expected, f"{answer.status}: {message}", remedy)


def _added_containers(pod: StepPod, answer: Answer) -> Iterator[Finding]:
    """Yield a fault where a webhook has put containers into the pod: with a sidecar that never ends, no step would."""
    names = {container["name"] for container in answer.document.get("spec", {}).get("containers", ())}
    if added := sorted(names - {pod_spec.CONTAINER_NAME}):
        where = f"the pod of {pod.step.name}"
        remedy = "exclude the namespace from the webhook that adds them (a service mesh's label, e.g.)"
        yield fault(CHECK, where, "its own container alone", f"also {', '.join(added)}", remedy)
