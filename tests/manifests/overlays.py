"""The manifests as kustomize builds them, and what they say of accounts and networks."""

from __future__ import annotations

import subprocess
import sysconfig
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import yaml

from qlora_retrain.config.profile import Profile

ROOT = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = ["gpu", "production", "kfp"]
PROFILES = ["gpu", "production"]  # each belongs to the overlay of its name
# Its kustomize builds the manifests without a cluster. Every environment has this one, whatever
# the machine has: Debian's, of 2020, knows no `patches`.
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"
Document = dict[str, Any]


@cache
def built(overlay: str) -> tuple[Document, ...]:
    done = subprocess.run([KUBECTL, "kustomize", ROOT / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a warning of kustomize"
    return tuple(yaml.safe_load_all(done.stdout))


def of(overlay: str, kind: str) -> list[Document]:
    return [document for document in built(overlay) if document["kind"] == kind]


def names(overlay: str, kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of(overlay, kind)}


def profile(name: str) -> Profile:
    document = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    return Profile.model_validate({**document, "require_digests": False})


def tokens(overlay: str) -> dict[str, bool]:
    """Which account's pods get a token of the API server; Kubernetes gives one where nothing is said."""
    accounts = of(overlay, "ServiceAccount")
    return {a["metadata"]["name"]: a.get("automountServiceAccountToken", True) for a in accounts}


def grants(overlay: str) -> dict[tuple[str, str], set[tuple[str, str, str]]]:
    """What each account, as (namespace, name), may do: (verb, resource, the one of that name or any)."""
    rules = {role["metadata"]["name"]: role["rules"] for role in of(overlay, "Role")}
    found: dict[tuple[str, str], set[tuple[str, str, str]]] = {}
    for binding in of(overlay, "RoleBinding"):
        for subject in binding["subjects"]:
            account = (subject.get("namespace", binding["metadata"]["namespace"]), subject["name"])
            found.setdefault(account, set()).update(
                (verb, "/".join(filter(None, [group, resource])), name)
                for rule in rules[binding["roleRef"]["name"]]
                for verb in rule["verbs"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for name in rule.get("resourceNames", ["any"])
            )
    return found


def admitted(overlay: str, resources: Document) -> Document:
    """A container's resources as the API server takes them: the namespace's LimitRange fills in what is not said."""
    (limits,) = of(overlay, "LimitRange")
    (container,) = limits["spec"]["limits"]
    given = resources.get("limits", {})
    return {
        "limits": {**container["default"], **given},
        "requests": {**container["defaultRequest"], **given, **resources.get("requests", {})},
    }


def reaches(peer: Document, address: str) -> bool:
    """Whether a rule's `to` is an address block with that address in it."""
    block = peer.get("ipBlock")
    return block is not None and (
        ip_address(address) in ip_network(block["cidr"])
        and not any(ip_address(address) in ip_network(network) for network in block.get("except", ()))
    )
