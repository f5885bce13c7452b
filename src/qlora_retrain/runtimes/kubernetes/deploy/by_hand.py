"""What no file of the repository can do: the steps that an engineer still takes by hand, for one profile and overlay.

They are read from the files, so that the list names the secrets, nodes and roles of this deployment, and ends where a
placeholder has been replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core import graph, images
from qlora_retrain.runtimes.kubernetes.deploy.rules import Deployment
from qlora_retrain.storage.keys import PLANNER, step_role

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import PodConfig

ROLE_ANNOTATION = "eks.amazonaws.com/role-arn"
# Values of the repository's own files that stand for the reader's.
_PLACEHOLDERS = {
    re.compile(r"\b(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d+(?:/\d+)?"): "addresses",
    re.compile(r"\b(?:111122223333|123456789012)\b"): "the number of the AWS account",
    re.compile(r"\bfs-0{8,}\b"): "the file system",
    re.compile(r"\b(?:registry|git)\.example\b[\w./:@-]*"): "a name of your own",
    re.compile(r"s3://my-bucket\b[\w/]*"): "the store",
    re.compile(r"s3://my-data\b/?"): "where your lines' sources lie",
}


def steps(deployment: Deployment) -> list[str]:
    """List what is left to do, in the order of docs/deploy.md."""
    return [
        *_placeholders(deployment),
        *_images(deployment),
        *_store_access(deployment),
        *_secrets(deployment),
        *_cluster(deployment),
        *_engine(deployment),
    ]


def _placeholders(deployment: Deployment) -> Iterator[str]:
    folder = deployment.overlay.folder
    files = [deployment.profile_path, *sorted(folder.glob("*.yaml"))]
    values = folder.parents[1] / "airflow" / "values.yaml"
    if not deployment.overlay.is_kubeflow:
        files += [file for file in (values, folder.parents[1] / "platform.yaml") if file.is_file()]
    for file in files:
        text = re.sub(r"#.*", "", file.read_text(encoding="utf-8"))
        for pattern, meaning in _PLACEHOLDERS.items():
            for value in dict.fromkeys(pattern.findall(text)):
                yield f"{short_path(file)}: replace the placeholder {value} with {meaning}"


def _images(deployment: Deployment) -> Iterator[str]:
    for reference in dict.fromkeys((deployment.profile.light_image, deployment.profile.train_image)):
        if images.has_digest(reference):
            yield f"push the image {reference}, if the registry does not have it yet"
        else:
            yield f"build and push the image {reference} (make images), then write it by its digest"


def _store_access(deployment: Deployment) -> Iterator[str]:
    accounts = deployment.overlay.of_kind("ServiceAccount")
    roles = {
        account["metadata"]["name"]: role
        for account in accounts
        if (role := (account["metadata"].get("annotations") or {}).get(ROLE_ANNOTATION))
    }
    for name, role in roles.items():
        yield f"create the role {role} for the account {name} (qlora-retrain policy, docs/deploy.md, step 1)"
    if not roles and not deployment.profile.secrets:
        yield "give the pods access to the store: annotate their accounts with roles, or name a secret in the profile"
    yield "give the bucket its policy, versioning, object lock and lifecycle (docs/deploy.md, step 1)"


def _secrets(deployment: Deployment) -> Iterator[str]:
    profile = deployment.profile
    (namespace,) = deployment.overlay.names("Namespace") or {profile.namespace}
    names = [secret.name for secret in profile.secrets]
    if profile.key_secrets:
        lines = [config.line for config in deployment.lines] or ["my-line"]
        by_line = ["" for _ in lines] if deployment.overlay.is_kubeflow else lines
        roles = [PLANNER, *(step_role(step, line) for step in graph.STEPS for line in by_line)]
        names += [secret for role in dict.fromkeys(roles) if (secret := profile.key_secret(role.rstrip("-")))]
    else:
        yield "make the keys that sign the store's documents (qlora-retrain keys create), then set key_secrets"
    for name in names:
        yield f"create the secret {name} in the namespace {namespace}"
    for name in profile.image_pull_secrets:
        yield f"create the secret {name} of the type docker-registry in the namespace {namespace}"


def _cluster(deployment: Deployment) -> Iterator[str]:
    profile, overlay = deployment.profile, deployment.overlay
    yield "use a network plugin that enforces NetworkPolicies; one that does not ignores them without a word"
    kinds = [("light steps", profile.light), ("steps with torch", profile.train)]
    kinds += [("GPU steps", profile.gpu)] if profile.gpu_resource else []
    for title, pod in kinds:
        yield f"have nodes for the {title}: {_describe_nodes(pod)}"
    if profile.gpu_resource:
        yield f"install the device plugin that offers {profile.gpu_resource}, and what labels the GPU nodes"
    if overlay.is_kubeflow:
        return
    if profile.storage_class and profile.storage_class not in overlay.names("StorageClass"):
        yield f"create the storage class {profile.storage_class}, which the overlay does not have"
    for storage_class in overlay.of_kind("StorageClass"):
        name = storage_class["metadata"]["name"]
        yield f"install the driver {storage_class['provisioner']} of the storage class {name}"
    if profile.local_queue:
        yield f"create Kueue's LocalQueue {profile.local_queue} in the namespace {profile.namespace}"


def _engine(deployment: Deployment) -> Iterator[str]:
    profile, overlay = deployment.profile, deployment.overlay
    if overlay.is_kubeflow:
        yield "put the API server's addresses into network.yaml (kubectl get endpointslices)"
        yield "check that Kubeflow Pipelines runs its drivers as pods (docs/kubeflow.md)"
        return
    gpus = [
        quota["spec"]["hard"][f"requests.{profile.gpu_resource}"]
        for quota in overlay.of_kind("ResourceQuota")
        if f"requests.{profile.gpu_resource}" in quota["spec"]["hard"]
    ]
    if profile.gpu_pool and gpus:
        yield f"let Airflow have the pool: airflow pools set --include-deferred {profile.gpu_pool} {gpus[0]} GPUs"
    path = short_path(deployment.profile_path)
    yield f"set QLORA_RETRAIN_PROFILE to {path} where Airflow runs (manifests/airflow/values.yaml)"
    yield "apply the overlay, then run the doctor inside the cluster (docs/deploy.md, step 7)"


def _describe_nodes(pod: PodConfig) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in sorted(pod.node_selector.items())) or "any label"
    taints = ", ".join(f"{taint.key}:{taint.effect or 'every effect'}" for taint in pod.tolerations) or "no taint"
    sizes = [f"{pod.cpus:g} cores"] if pod.cpus else []
    memory = pod.max_memory_gib or pod.memory_gib
    sizes += [f"{memory:g} GiB of memory"] if isinstance(memory, float) else []
    return f"labels {labels}; tolerated taints: {taints}" + (f"; at least {' and '.join(sizes)}" if sizes else "")


def short_path(path: Path) -> str:
    """Return a path from this folder on, where it is below it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(path)
