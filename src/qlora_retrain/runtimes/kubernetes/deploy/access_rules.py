"""Rules on what a deployment names and on who may do what; see `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_retrain.runtimes.kubernetes import permissions
from qlora_retrain.runtimes.kubernetes.deploy.overlay import Document
from qlora_retrain.runtimes.kubernetes.deploy.rules import Deployment
from qlora_retrain.runtimes.kubernetes.findings import Finding, fault


def account_faults(deployment: Deployment) -> Iterator[Finding]:
    """Every account that a pod runs as exists, and only Kubeflow's has a token of the API server."""
    overlay, profile = deployment.overlay, deployment.profile
    tokens = {
        account["metadata"]["name"]: account.get("automountServiceAccountToken", True)
        for account in overlay.of_kind("ServiceAccount")
    }
    expected_accounts = (
        {profile.service_account or "default": "Kubeflow's runs"}
        if overlay.is_kubeflow
        else {pod.account: f"the pod of {pod.step.name}" for pod in deployment.pods}
    )
    for name, user in expected_accounts.items():
        if name not in tokens and name != "default":
            remedy = "add it to accounts.yaml of the overlay, or name another in the profile"
            yield fault("accounts", f"ServiceAccount {name}", f"the account of {user}", "none in the overlay", remedy)
        elif tokens.get(name, True) is not overlay.is_kubeflow and name in tokens:
            where = f"ServiceAccount {name}, automountServiceAccountToken"
            actual = str(tokens[name]).lower()
            remedy = "KFP's launcher needs a token" if overlay.is_kubeflow else "a step needs no token: set it to false"
            yield fault("accounts", where, str(overlay.is_kubeflow).lower(), actual, remedy)


def role_faults(deployment: Deployment) -> Iterator[Finding]:
    """Every binding names a role and accounts that exist, and Airflow's accounts may do exactly what they must."""
    overlay = deployment.overlay
    accounts = overlay.names("ServiceAccount")
    for binding in overlay.of_kind("RoleBinding"):
        where = f"RoleBinding {binding['metadata']['name']}"
        if binding["roleRef"]["name"] not in overlay.names(binding["roleRef"]["kind"]):
            expected = f"{binding['roleRef']['kind']} {binding['roleRef']['name']}"
            yield fault("roles", where, expected, "no such role in the overlay", "add it, or correct roleRef")
        for subject in binding.get("subjects", ()):
            is_own = subject.get("namespace", binding["metadata"]["namespace"]) == binding["metadata"]["namespace"]
            if is_own and subject["kind"] == "ServiceAccount" and subject["name"] not in accounts | {"default"}:
                expected = f"ServiceAccount {subject['name']}"
                yield fault("roles", where, expected, "none in the overlay", "add the account, or correct the subject")

    if overlay.is_kubeflow:
        return
    # With the Celery and the Kubernetes executor the tasks run as another account, so they are taken together.
    granted = {name: _granted(deployment, name) for name in _airflow_subjects(deployment)}
    triggerers = {name for name in granted if "triggerer" in name}
    for title, names, needed in (
        ("Airflow's tasks", granted.keys() - triggerers, permissions.TASKS),
        ("Airflow's triggerer", triggerers, permissions.TRIGGERER),
    ):
        allowed = {permission for name in names for permission in granted[name]}
        where = f"{title} ({', '.join(sorted(names)) or 'no account is bound'})"
        remedy = "keep manifests/base/rbac.yaml in the overlay"
        if missing := sorted(needed - allowed):
            yield fault(
                "roles", where, f"to be allowed: {', '.join(sorted(needed))}", f"missing: {', '.join(missing)}", remedy
            )
        if extra := sorted(allowed - needed):
            remedy = "take it away: whoever may create pods or read secrets here has every step's rights"
            yield fault("roles", where, "no further permission", ", ".join(extra), remedy)


def object_faults(deployment: Deployment) -> Iterator[Finding]:
    """The overlay creates the namespace, the priority class and the claim that the profile names."""
    overlay, profile = deployment.overlay, deployment.profile
    if overlay.is_kubeflow:
        return
    for kind, name, setting in (
        ("Namespace", profile.namespace, "namespace"),
        ("PriorityClass", profile.priority_class, "priority_class"),
        ("PersistentVolumeClaim", profile.cache_claim, "cache_claim"),
    ):
        if name is not None and name not in overlay.names(kind):
            actual = ", ".join(sorted(overlay.names(kind))) or "none in the overlay"
            remedy = f"create it in the overlay, or correct {setting} in {deployment.profile_path}"
            yield fault("objects", f"{kind}, as {setting} says", name, actual, remedy)
    namespaces = {d["metadata"]["namespace"] for d in overlay.documents if "namespace" in d["metadata"]}
    if namespaces - {profile.namespace}:
        where, actual = "the overlay's namespace", ", ".join(sorted(namespaces))
        yield fault("objects", where, profile.namespace, actual, f"correct namespace in {deployment.profile_path}")


def _airflow_subjects(deployment: Deployment) -> set[str]:
    return {
        subject["name"]
        for binding in deployment.overlay.of_kind("RoleBinding")
        for subject in binding.get("subjects", ())
        if subject.get("namespace") == permissions.AIRFLOW_NAMESPACE
    }


def _granted(deployment: Deployment, account: str) -> set[str]:
    """Return what Airflow's account of this name may do, as `verb resource`."""
    roles: dict[str, Document] = {role["metadata"]["name"]: role for role in deployment.overlay.of_kind("Role")}
    return {
        f"{verb} {resource}"
        for binding in deployment.overlay.of_kind("RoleBinding")
        if any(subject["name"] == account for subject in binding.get("subjects", ()))
        for rule in roles.get(binding["roleRef"]["name"], {"rules": ()})["rules"]
        for verb in rule["verbs"]
        for resource in rule.get("resources", ())
    }
