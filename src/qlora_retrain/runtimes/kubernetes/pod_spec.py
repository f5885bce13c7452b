"""What a step's pod gets on Kubernetes: its nodes, its resources, its security context, its volumes.

Reads the cluster's profile and the platform's `runtime`; builds the arguments of Airflow's KubernetesPodOperator.
Every container satisfies the restricted Pod Security Standard. Nothing of the worker's environment enters a pod. No
secret is in its variables: secrets are mounted, as the profile names them, or the service account has a role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kubernetes.client import models as k8s

from qlora_retrain.config.cluster_profile import DEFAULT_DISK_GIB, quantity
from qlora_retrain.core import graph
from qlora_retrain.core.graph import Step
from qlora_retrain.runtimes import credentials
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.storage.keys import KEYS_VARIABLE, step_role

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig

CONTAINER_NAME = "base"  # the name that KubernetesPodOperator gives to its container
USER_ID = 10001  # the images' own user
# The images' first process allows a step 60 seconds to save its work; the rest is for the last parts of an upload.
GRACE_PERIOD_SECONDS = 120
CACHE_DIR = "/cache"
# An autoscaler that consolidates nodes must not evict a running step: each eviction costs one of its few tries.
ANNOTATIONS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # Kueue holds back a pod with it until the queue has room
LABELS = {"app.kubernetes.io/name": "qlora-retrain"}  # the network policies select pods by it
_TMP_GIB = 1
_LOG_GIB = 1  # the container's output is on the node's disk; by default a kubelet keeps 50 MiB of it
_POD_SECURITY_CONTEXT = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,  # a new volume belongs to root; this makes it writable
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY_CONTEXT = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def operator_arguments(step: Step, line: str, profile: ClusterProfile, runtime: RuntimeConfig) -> dict[str, Any]:
    """Build the operator's arguments that describe a step's pod and, without `auto`, are the same for every run."""
    pod = profile.pod(step)
    image = profile.image(step.image)
    variables = {
        **profile.env,
        "QLORA_RETRAIN_IMAGE": image,
        "QLORA_RETRAIN_CACHE": CACHE_DIR if profile.cache_claim else f"{container_spec.WORK_DIR}/cache",
        # The step's own files stay on the pod's disk, also where the cache is a volume that pods share.
        "QLORA_RETRAIN_WORK": f"{container_spec.WORK_DIR}/work",
        "TMPDIR": "/tmp",  # noqa: S108 - the container's own
    }
    key_secret = profile.key_secret(step_role(step, line))
    if key_secret:
        variables[KEYS_VARIABLE] = credentials.KEYS_DIR
    volumes = _volumes(step, profile, runtime, key_secret)

    return {
        "namespace": profile.namespace,
        "image": image,
        "labels": labels(step.name, line, profile),
        "annotations": ANNOTATIONS,
        "env_vars": [k8s.V1EnvVar(name=name, value=value) for name, value in variables.items()],
        "container_resources": resource_requirements(step, profile, runtime),
        "volumes": [volume for volume, _ in volumes],
        "volume_mounts": [mount for _, mount in volumes],
        "node_selector": dict(pod.node_selector),
        "tolerations": [k8s.V1Toleration(**taint.model_dump(exclude_none=True)) for taint in pod.tolerations],
        "image_pull_secrets": [k8s.V1LocalObjectReference(name=name) for name in profile.image_pull_secrets],
        "service_account_name": profile.account(step, line),
        "automount_service_account_token": False,
        "priority_class_name": profile.priority_class,
        "security_context": _POD_SECURITY_CONTEXT,
        "container_security_context": CONTAINER_SECURITY_CONTEXT,
        # No pod has the sidecar, because no task pushes an XCom. If Airflow adds one, it must be confined too.
        "xcom_sidecar_container_security_context": CONTAINER_SECURITY_CONTEXT,
        "termination_grace_period": GRACE_PERIOD_SECONDS,
        "termination_message_policy": "FallbackToLogsOnError",  # the last lines stay in the pod's status
    }


def labels(step: str, line: str, profile: ClusterProfile) -> dict[str, str]:
    """Return the labels by which a pod can be found without its name, and that of its queue."""
    queue = {QUEUE_LABEL: profile.local_queue} if profile.local_queue else {}
    return {**LABELS, container_spec.STEP_LABEL: step, "qlora-retrain.line": line, **queue}


def resource_requirements(
    step: Step, profile: ClusterProfile, runtime: RuntimeConfig, memory_gib: float | None = None
) -> k8s.V1ResourceRequirements:
    """Build the container's requests and limits.

    Args:
        step: The step that the pod runs.
        profile: The cluster's.
        runtime: The platform's for the line, which overrides the profile.
        memory_gib: Replaces both, where an earlier try was killed for memory.
    """
    requests, limits = {}, {}
    cpus = runtime.cpus or profile.pod(step).cpus
    memory = memory_gib or first_memory_gib(step, profile, runtime)
    if cpus:
        requests["cpu"] = f"{cpus:g}"  # without a limit, so that a step may use the node's idle cores
    if memory:
        requests["memory"] = limits["memory"] = quantity(memory)

    # Space on the node's disk, which the scheduler counts. Without this entry the namespace's default would apply.
    disk_gib = 0 if profile.storage_class else _work_volume_gib(profile, runtime)
    requests["ephemeral-storage"] = limits["ephemeral-storage"] = quantity(disk_gib + _TMP_GIB + _LOG_GIB)

    if gpus := profile.gpus(step):
        assert profile.gpu_resource is not None
        requests[profile.gpu_resource] = limits[profile.gpu_resource] = str(gpus)
    return k8s.V1ResourceRequirements(requests=requests, limits=limits)


def first_memory_gib(step: Step, profile: ClusterProfile, runtime: RuntimeConfig) -> float | None:
    """Return the memory in GiB that a first try gets; None: no limit, or `auto` before `pod_size` replaced it."""
    memory_gib = runtime.memory_gib or profile.pod(step).memory_gib
    return None if memory_gib == "auto" else memory_gib


def increased_memory_gib(previous_gib: float | None, step: Step, profile: ClusterProfile) -> float | None:
    """Return the memory in GiB for the try after one that was killed for memory with `previous_gib`.

    It is 1.5 times as much, up to the profile's maximum; None where the pod had the maximum, or there is none.
    """
    max_gib = profile.pod(step).max_memory_gib
    if previous_gib is None or max_gib is None or previous_gib >= max_gib:
        return None
    return min(previous_gib * 1.5, max_gib)


def pod_name(step: str, key: str, run_id: str) -> str:
    """Name a pod: one name for each key and run, the same for every try, so the cluster refuses a second pod.

    It has at most 63 characters, because a pod's name is also its host name.
    """
    return f"qlora-{step.replace('_', '-')}-{key[:12]}-{run_id.lower()}"


def service_account_names(profile: ClusterProfile, line: str) -> set[str]:
    """Return every service account that a pod of this profile runs as."""
    names = (*(profile.account(step, line) for step in graph.STEPS), profile.mirror_account())
    return {name for name in names if name}


def _work_volume_gib(profile: ClusterProfile, runtime: RuntimeConfig) -> float:
    disk_gib = runtime.disk_gib or profile.disk_gib
    return DEFAULT_DISK_GIB if disk_gib == "auto" else disk_gib


def _volumes(
    step: Step, profile: ClusterProfile, runtime: RuntimeConfig, key_secret: str | None
) -> list[tuple[k8s.V1Volume, k8s.V1VolumeMount]]:
    size = quantity(_work_volume_gib(profile, runtime))
    # A volume of its own, or a folder on the node's disk whose limit the kubelet enforces.
    if profile.storage_class:
        claim = k8s.V1PersistentVolumeClaimSpec(
            access_modes=["ReadWriteOnce"],
            storage_class_name=profile.storage_class,
            resources=k8s.V1VolumeResourceRequirements(requests={"storage": size}),
        )
        template = k8s.V1PersistentVolumeClaimTemplate(spec=claim)
        work = k8s.V1Volume(name="work", ephemeral=k8s.V1EphemeralVolumeSource(volume_claim_template=template))
    else:
        work = k8s.V1Volume(name="work", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit=size))

    volumes = [(work, container_spec.WORK_DIR, False), (_empty_dir("tmp", quantity(_TMP_GIB)), "/tmp", False)]  # noqa: S108

    # Data loaders and NCCL exchange tensors through shared memory, of which a pod has 64 MiB by default.
    if profile.gpus(step):
        volumes.append((_empty_dir("shm", "1Gi", medium="Memory"), "/dev/shm", False))  # noqa: S108
    if profile.cache_claim:
        source = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=profile.cache_claim)
        volumes.append((k8s.V1Volume(name="cache", persistent_volume_claim=source), CACHE_DIR, False))

    secrets = [(f"secret-{index}", secret.name, secret.mount) for index, secret in enumerate(profile.secrets)]
    secrets += [("keys", key_secret, credentials.KEYS_DIR)] if key_secret else []
    for volume, secret_name, mount in secrets:
        # 0440: only group 10001, which is the pod's fsGroup, can read it.
        source = k8s.V1SecretVolumeSource(secret_name=secret_name, default_mode=0o440)
        volumes.append((k8s.V1Volume(name=volume, secret=source), mount, True))

    return [
        (volume, k8s.V1VolumeMount(name=volume.name, mount_path=path, read_only=read_only or None))
        for volume, path, read_only in volumes
    ]


def _empty_dir(volume: str, size: str, medium: str | None = None) -> k8s.V1Volume:
    return k8s.V1Volume(name=volume, empty_dir=k8s.V1EmptyDirVolumeSource(size_limit=size, medium=medium))
