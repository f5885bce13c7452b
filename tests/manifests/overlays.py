"""The manifests as kustomize builds them, and what they grant to accounts and networks."""

from __future__ import annotations

import subprocess
import sysconfig
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import yaml

from qlora_retrain.config.cluster_profile import ClusterProfile

ROOT = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = ["gpu", "production", "kfp"]
PROFILES = ["gpu", "production"]  # each belongs to the overlay of its name
# A package of the environment: its kustomize builds the manifests without a cluster. The machine's own may be too old;
# Debian's, of 2020, does not know `patches`.
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"
Document = dict[str, Any]


@cache
def build_overlay(overlay: str) -> tuple[Document, ...]:
    """Build an overlay; return its documents."""
    completed = subprocess.run([KUBECTL, "kustomize", ROOT / "overlays" / overlay], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == "", "a warning of kustomize"
    return tuple(yaml.safe_load_all(completed.stdout))


def documents_of_kind(overlay: str, kind: str) -> list[Document]:
    return [document for document in build_overlay(overlay) if document["kind"] == kind]


def names_of_kind(overlay: str, kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in documents_of_kind(overlay, kind)}


def load_profile(name: str) -> ClusterProfile:
    document = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    return ClusterProfile.model_validate({**document, "require_digests": False})


def token_by_account(overlay: str) -> dict[str, bool]:
    """Return which accounts' pods get a token of the API server; Kubernetes mounts one by default."""
    accounts = documents_of_kind(overlay, "ServiceAccount")
    return {a["metadata"]["name"]: a.get("automountServiceAccountToken", True) for a in accounts}


def granted_permissions(overlay: str) -> dict[tuple[str, str], set[tuple[str, str, str]]]:
    """Return what each account may do: (namespace, name) -> {(verb, resource, the resource's name or "any")}."""
    rules = {role["metadata"]["name"]: role["rules"] for role in documents_of_kind(overlay, "Role")}
    permissions: dict[tuple[str, str], set[tuple[str, str, str]]] = {}
    for binding in documents_of_kind(overlay, "RoleBinding"):
        for subject in binding["subjects"]:
            account = (subject.get("namespace", binding["metadata"]["namespace"]), subject["name"])
            permissions.setdefault(account, set()).update(
                (verb, "/".join(filter(None, [group, resource])), name)
                for rule in rules[binding["roleRef"]["name"]]
                for verb in rule["verbs"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for name in rule.get("resourceNames", ["any"])
            )
    return permissions


def apply_limit_range(overlay: str, resources: Document) -> Document:
    """Return a container's resources as the API server stores them: its LimitRange adds the defaults."""
    (limits,) = documents_of_kind(overlay, "LimitRange")
    (container,) = limits["spec"]["limits"]
    own_limits = resources.get("limits", {})
    return {
        "limits": {**container["default"], **own_limits},
        "requests": {**container["defaultRequest"], **own_limits, **resources.get("requests", {})},
    }


def allows_address(peer: Document, address: str) -> bool:
    """Return whether a peer in a rule's `to` is an address block that contains the address."""
    block = peer.get("ipBlock")
    return block is not None and (
        ip_address(address) in ip_network(block["cidr"])
        and not any(ip_address(address) in ip_network(network) for network in block.get("except", ()))
    )
