"""What a step's pod gets on Kubernetes: where it runs, how it is confined, what it may take, what it sees.

Reads the cluster's profile and the line's `runtime` section; makes the arguments of Airflow's KubernetesPodOperator.
Every container satisfies the restricted Pod Security Standard. Nothing of the worker's environment enters a pod, and no
secret can be in its settings: those are mounted, as the profile names them, or come from the service account's role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kubernetes.client import models as k8s

from qlora_retrain.core import graph
from qlora_retrain.core.graph import Step
from qlora_retrain.runtimes.docker import container_spec

if TYPE_CHECKING:
    from qlora_retrain.config.profile import Profile
    from qlora_retrain.config.sections import RuntimeConfig

CONTAINER = "base"  # as the operator calls it
USER = 10001  # the images' own
GRACE_SECONDS = 120  # the images' first process allows a step 60 to save; the rest is for the upload's last parts
CACHE = "/cache"
# An autoscaler that tidies up takes no node from under a step: each time would cost a try, and there are few.
ANNOTATIONS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
LABELS = {"app.kubernetes.io/name": "qlora-retrain"}  # of whom the network policies speak
_TMP_GIB = 1
_LOG_GIB = 1  # what the container prints is on the node's disk; a kubelet keeps 50 MiB of it unless told otherwise
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,  # so that a new volume, which is root's, can be written
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONFINED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def arguments(step: Step, line: str, profile: Profile, runtime: RuntimeConfig) -> dict[str, Any]:
    """What the operator is told about the pod of a step, whatever the run."""
    pod = profile.pod(step)
    image = profile.image(step.image)
    variables = {
        **profile.env,
        "QLORA_RETRAIN_IMAGE": image,
        "QLORA_RETRAIN_CACHE": CACHE if profile.cache_claim else f"{container_spec.WORK}/cache",
        "QLORA_RETRAIN_WORK": f"{container_spec.WORK}/work",  # the pod's own disk, whether or not the cache is there
        "TMPDIR": "/tmp",  # noqa: S108 - the container's own
    }
    volumes = _volumes(step, profile, runtime)
    account = profile.publish_service_account if step.store else None
    return {
        "namespace": profile.namespace,
        "image": image,
        "labels": labels(step.name, line),
        "annotations": ANNOTATIONS,
        "env_vars": [k8s.V1EnvVar(name=name, value=value) for name, value in variables.items()],
        "container_resources": resources(step, profile, runtime),
        "volumes": [volume for volume, _ in volumes],
        "volume_mounts": [mount for _, mount in volumes],
        "node_selector": dict(pod.node_selector),
        "tolerations": [k8s.V1Toleration(**taint.model_dump(exclude_none=True)) for taint in pod.tolerations],
        "image_pull_secrets": [k8s.V1LocalObjectReference(name=name) for name in profile.image_pull_secrets],
        "service_account_name": account or profile.service_account,
        "automount_service_account_token": False,
        "priority_class_name": profile.priority_class,
        "security_context": _POD_SECURITY,
        "container_security_context": CONFINED,
        "xcom_sidecar_container_security_context": CONFINED,  # there is none; should one come, it is confined too
        "termination_grace_period": GRACE_SECONDS,
        "termination_message_policy": "FallbackToLogsOnError",  # the last lines stay with the pod's status
    }


def labels(step: str, line: str) -> dict[str, str]:
    """What a pod can be found by, beside its name."""
    return {**LABELS, container_spec.LABEL: step, "qlora-retrain.line": line}


def resources(
    step: Step, profile: Profile, runtime: RuntimeConfig, memory_gib: float | None = None
) -> k8s.V1ResourceRequirements:
    """Asked for and allowed.

    Args:
        step: Whose.
        profile: The cluster's.
        runtime: The line's section, which goes before the profile.
        memory_gib: Instead of either, where an earlier try was killed for memory.
    """
    requests, limits = {}, {}
    cpus = runtime.cpus or profile.pod(step).cpus
    memory = memory_gib or memory_of(step, profile, runtime)
    if cpus:
        requests["cpu"] = f"{cpus:g}"  # no limit: idle cores are nobody's
    if memory:
        requests["memory"] = limits["memory"] = f"{memory:g}Gi"
    # Of the node's disk, for the scheduler; without a word of it a namespace's default would be asked for.
    work_gib = 0 if profile.storage_class else _work_gib(profile, runtime)
    requests["ephemeral-storage"] = limits["ephemeral-storage"] = f"{work_gib + _TMP_GIB + _LOG_GIB:g}Gi"
    if gpus := profile.gpus(step):
        assert profile.gpu_resource is not None
        requests[profile.gpu_resource] = limits[profile.gpu_resource] = str(gpus)
    return k8s.V1ResourceRequirements(requests=requests, limits=limits)


def memory_of(step: Step, profile: Profile, runtime: RuntimeConfig) -> float | None:
    """GiB of memory that a first try gets."""
    return runtime.memory_gib or profile.pod(step).memory_gib


def more_memory(had_gib: float | None, step: Step, profile: Profile) -> float | None:
    """GiB of memory for the try after one that was killed for memory with `had_gib`; None where there is no more."""
    most = profile.pod(step).max_memory_gib
    if had_gib is None or most is None or had_gib >= most:
        return None
    return min(had_gib * 1.5, most)


def name(step: str, key: str, run_id: str) -> str:
    """A pod's name: one for a key and a run, whichever try, so the cluster itself refuses a second one.

    At most 63 characters, for a pod's name is also its host name.
    """
    return f"qlora-{step.replace('_', '-')}-{key[:12]}-{run_id.lower()}"


def service_accounts(profile: Profile) -> set[str]:
    """Every service account that a pod of this profile runs as."""
    named = [(profile.publish_service_account if s.store else None) or profile.service_account for s in graph.STEPS]
    return {account for account in named if account}


def _work_gib(profile: Profile, runtime: RuntimeConfig) -> float:
    return runtime.disk_gib or profile.work_gib


def _volumes(step: Step, profile: Profile, runtime: RuntimeConfig) -> list[tuple[k8s.V1Volume, k8s.V1VolumeMount]]:
    disk = f"{_work_gib(profile, runtime):g}Gi"
    if profile.storage_class:
        claim = k8s.V1PersistentVolumeClaimSpec(
            access_modes=["ReadWriteOnce"],
            storage_class_name=profile.storage_class,
            resources=k8s.V1VolumeResourceRequirements(requests={"storage": disk}),
        )
        template = k8s.V1PersistentVolumeClaimTemplate(spec=claim)
        work = k8s.V1Volume(name="work", ephemeral=k8s.V1EphemeralVolumeSource(volume_claim_template=template))
    else:
        work = k8s.V1Volume(name="work", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit=disk))
    found = [(work, container_spec.WORK, False), (_empty("tmp", f"{_TMP_GIB}Gi"), "/tmp", False)]  # noqa: S108
    if profile.gpus(step):  # data loaders and NCCL exchange through it, and a pod has 64 MiB of its own
        found.append((_empty("shm", "1Gi", medium="Memory"), "/dev/shm", False))  # noqa: S108
    if profile.cache_claim:
        source = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=profile.cache_claim)
        found.append((k8s.V1Volume(name="cache", persistent_volume_claim=source), CACHE, False))
    for number, secret in enumerate(profile.secrets):
        # Read by group 10001 alone, which is the pod's fsGroup.
        source = k8s.V1SecretVolumeSource(secret_name=secret.name, default_mode=0o440)
        found.append((k8s.V1Volume(name=f"secret-{number}", secret=source), secret.mount, True))
    return [
        (volume, k8s.V1VolumeMount(name=volume.name, mount_path=path, read_only=read_only or None))
        for volume, path, read_only in found
    ]


def _empty(volume: str, size: str, medium: str | None = None) -> k8s.V1Volume:
    return k8s.V1Volume(name=volume, empty_dir=k8s.V1EmptyDirVolumeSource(size_limit=size, medium=medium))
