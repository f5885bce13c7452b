"""A cluster to which manifests were applied: it answers the doctor from their documents, as an API server would.

Access reviews are decided by the applied roles, dry runs by the applied namespace, accounts and policies. A test spoils
one document and sees what the doctor says.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import aiohttp.web

from qlora_retrain.runtimes.kubernetes import pod_security
from tests.runtimes.kubernetes.cluster import TEST_USER_AGENT, Emulator, FakeCluster

Document = dict[str, Any]
_PATH = re.compile(
    r"/apis?(?:/(?P<group>[\w.]+))?/v1(?:/namespaces/(?P<namespace>[^/]+))?/(?P<kind>\w+)(?:/(?P<name>.+))?$"
)
_KINDS = {
    "serviceaccounts": "ServiceAccount",
    "resourcequotas": "ResourceQuota",
    "limitranges": "LimitRange",
    "networkpolicies": "NetworkPolicy",
    "persistentvolumeclaims": "PersistentVolumeClaim",
}
CPU_NODE: Document = {
    "metadata": {"name": "cpu-1", "labels": {"kubernetes.io/arch": "amd64"}},
    "spec": {},
    "status": {"allocatable": {"cpu": "16", "memory": "70Gi", "ephemeral-storage": "300Gi"}},
}
GPU_NODE: Document = {
    "metadata": {"name": "gpu-1", "labels": {"kubernetes.io/arch": "amd64", "nvidia.com/gpu.present": "true"}},
    "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    "status": {
        "allocatable": {"cpu": "32", "memory": "250Gi", "ephemeral-storage": "300Gi", "nvidia.com/gpu": "8"},
    },
}


class AppliedEmulator(Emulator):
    """The API of such a cluster.

    Attributes:
        documents: What was applied.
        nodes: Its nodes.
        stricter: Refuse every pod by Pod Security, as an own policy above `restricted` would.
        sidecar: A container that a webhook adds to every pod; empty: none.
        clock_shift: How far the server's clock is ahead.
        created: Pods that were created in earnest.
    """

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.documents: list[Document] = []
        self.nodes = [copy.deepcopy(CPU_NODE), copy.deepcopy(GPU_NODE)]
        self.stricter = False
        self.sidecar = ""
        self.clock_shift = timedelta()
        self.created: list[str] = []

    def kind(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    async def _handle(self, request: Any) -> Any:
        if request.headers.get("User-Agent") == TEST_USER_AGENT:
            return await super()._handle(request)
        status, document = self.answer(str(request.method.value).upper(), request.url.path, request)
        date = format_datetime(datetime.now(UTC) + self.clock_shift, usegmt=True)
        return aiohttp.web.json_response(document, status=status, headers={"Date": date})

    def answer(self, method: str, path: str, request: Any) -> tuple[int, Document]:
        if path == "/version":
            return 200, {"major": "1", "minor": "36"}
        match = _PATH.match(path)
        assert match, path
        kind, name = match["kind"], match["name"]
        verb = {"POST": "create", "GET": "get" if name else "list"}[method]
        self.used_verbs.add((verb, "/".join(filter(None, (match["group"], kind)))))
        if method in self.rejections:
            status, message = self.rejections[method]
            return status, {"message": message}

        if kind == "nodes":
            return 200, {"items": self.nodes, "metadata": {}}
        if kind == "localsubjectaccessreviews":
            return 201, {**request.data, "status": {"allowed": self.allows(request.data["spec"])}}
        if kind == "pods":
            return self.create_pod(request.data, match["namespace"], is_dry_run=request.params.get("dryRun") == "All")
        items = [d for d in self.kind(_KINDS[kind]) if d["metadata"]["namespace"] == match["namespace"]]
        if name is None:
            return 200, {"items": items, "metadata": {}}
        item = next((item for item in items if item["metadata"]["name"] == name), None)
        return (200, item) if item else (404, {"message": f'{kind} "{name}" not found'})

    def allows(self, spec: Document) -> bool:
        """Decide an access review by the applied roles and bindings."""
        asked_for = spec["resourceAttributes"]
        resource = "/".join(filter(None, (asked_for["resource"], asked_for.get("subresource"))))
        _, _, namespace, account = spec["user"].split(":")
        rules = {role["metadata"]["name"]: role["rules"] for role in self.kind("Role")}
        return any(
            asked_for["verb"] in rule["verbs"] and resource in rule["resources"]
            for binding in self.kind("RoleBinding")
            if binding["metadata"]["namespace"] == asked_for["namespace"]
            for subject in binding["subjects"]
            if (subject.get("namespace"), subject["name"]) == (namespace, account)
            for rule in rules.get(binding["roleRef"]["name"], ())
        )

    def create_pod(self, pod: Document, namespace: str, *, is_dry_run: bool) -> tuple[int, Document]:
        """Admit a pod or refuse it, as the applied documents say."""
        if not is_dry_run:
            self.created.append(pod["metadata"]["name"])
        account, spec = pod["spec"]["serviceAccountName"], pod["spec"]
        if account not in {d["metadata"]["name"] for d in self.kind("ServiceAccount")}:
            message = f'pods "x" is forbidden: error looking up service account {namespace}/{account}: not found'
            return 403, {"message": message}
        violations = pod_security.restricted(pod) + (["hostUsers != false"] if self.stricter else [])
        if violations:
            return 403, {"message": f'pods "x" is forbidden: violates PodSecurity "restricted:v1.30": {violations}'}
        images = [container["image"] for container in spec["containers"]]
        if self.kind("ValidatingAdmissionPolicyBinding") and not all("@sha256:" in image for image in images):
            return 422, {"message": "qlora-retrain: expected images as name@sha256:..."}
        sidecars = [{"name": self.sidecar, "image": "mesh"}] if self.sidecar else []
        return 201, {**pod, "spec": {**spec, "containers": [*spec["containers"], *sidecars]}}


class AppliedCluster(FakeCluster):
    """A cluster with the documents of an overlay."""

    emulator: AppliedEmulator

    def apply(self, documents: Any) -> None:
        self.emulator.documents = [copy.deepcopy(document) for document in documents]

    def document(self, kind: str, name: str) -> Document:
        return next(d for d in self.emulator.kind(kind) if d["metadata"]["name"] == name)

    def remove(self, kind: str, name: str) -> None:
        self.emulator.documents.remove(self.document(kind, name))


def applied_cluster(folder: Path, *, secure: bool = False) -> Iterator[AppliedCluster]:
    cluster = AppliedCluster(folder, secure=secure, emulator_class=AppliedEmulator)
    yield cluster
    cluster.close()
