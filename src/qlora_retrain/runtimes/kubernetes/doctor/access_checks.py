"""Who exists, and who may do what: service accounts, Airflow's permissions, and those that no pod may have.

The API itself decides: the doctor asks it with a LocalSubjectAccessReview for each account and action, and needs no
right to read roles.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_retrain.runtimes.kubernetes import permissions
from qlora_retrain.runtimes.kubernetes.doctor.cluster_api import APPLY, Answer, refusal
from qlora_retrain.runtimes.kubernetes.doctor.cluster_view import ClusterView
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault, unknown

# With the Celery and the Kubernetes executor the tasks run as the second.
_TASK_ACCOUNTS = ("airflow-scheduler", "airflow-worker")
_TRIGGERER_ACCOUNT = "airflow-triggerer"


def check_accounts(cluster: ClusterView) -> Iterator[Finding]:
    """Every account that a pod runs as exists."""
    users = {pod.account: pod.step.name for pod in cluster.pods}
    for name, step in users.items():
        answer = cluster.api.get(f"{cluster.path('serviceaccounts')}/{name}")
        where = f"ServiceAccount {name} in {cluster.namespace}"
        if answer.status == 404:
            remedy = "apply the overlay; an account of publish is copied for each line (accounts.yaml)"
            yield fault("accounts", where, f"the account of {step}'s pod", "none", remedy)
        else:
            yield from refusal("accounts", where, answer)


def check_roles(cluster: ClusterView) -> Iterator[Finding]:
    """Airflow's accounts may do what they must, and nobody but Airflow's tasks may create pods or read secrets."""
    yield from _check_airflow(cluster, _TASK_ACCOUNTS, permissions.TASKS)
    yield from _check_airflow(cluster, (_TRIGGERER_ACCOUNT,), permissions.TRIGGERER)
    accounts = {(cluster.namespace, pod.account) for pod in cluster.pods}
    for namespace, name in sorted({*accounts, (permissions.AIRFLOW_NAMESPACE, _TRIGGERER_ACCOUNT)}):
        for permission in sorted(permissions.TOO_MUCH):
            answer = _review(cluster, namespace, name, permission)
            if _is_allowed(answer):
                where = f"account {name} in {namespace}"
                remedy = "take the role away: with it a step has the rights of every other"
                yield fault("roles", where, f"that it may not {permission}", "that it may", remedy)


def _check_airflow(cluster: ClusterView, names: tuple[str, ...], needed: frozenset[str]) -> Iterator[Finding]:
    """Yield what none of these accounts may do completely."""
    missing: dict[str, list[str]] = {}
    for name in names:
        for permission in sorted(needed):
            answer = _review(cluster, permissions.AIRFLOW_NAMESPACE, name, permission)
            if not answer.is_success:
                reason = f"{name}: the cluster says nothing of its permissions: {answer.message}"
                yield unknown("roles", reason, APPLY)
                return
            if not _is_allowed(answer):
                missing.setdefault(name, []).append(permission)
        if name not in missing:
            return
    # The account that can do the most is the one that was meant.
    name = min(missing, key=lambda candidate: len(missing[candidate]))
    where = f"account {name} in {permissions.AIRFLOW_NAMESPACE}"
    actual = f"that it may not {', '.join(missing[name])} in {cluster.namespace}"
    remedy = "apply manifests/base/rbac.yaml; it must name the account that Airflow's chart has made"
    yield fault("roles", where, f"that it may {', '.join(sorted(needed))}", actual, remedy)


def _review(cluster: ClusterView, namespace: str, name: str, permission: str) -> Answer:
    """Ask the API whether an account may do something in the pods' namespace."""
    verb, _, resource = permission.partition(" ")
    resource, _, subresource = resource.partition("/")
    attributes = {"namespace": cluster.namespace, "verb": verb, "resource": resource}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "LocalSubjectAccessReview",
        "metadata": {"namespace": cluster.namespace},
        "spec": {
            "user": f"system:serviceaccount:{namespace}:{name}",
            "groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"],
            "resourceAttributes": {**attributes, **({"subresource": subresource} if subresource else {})},
        },
    }
    return cluster.api.post(cluster.path("localsubjectaccessreviews", "authorization.k8s.io"), body)


def _is_allowed(answer: Answer) -> bool:
    return answer.is_success and bool((answer.document.get("status") or {}).get("allowed"))
