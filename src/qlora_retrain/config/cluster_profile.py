"""A cluster's profile: on which nodes the steps' pods run, their resources, and which secrets they see.

A profile belongs to a cluster and not to a line, and nothing in it changes a result. It can hold no secret, only the
names of secrets. Airflow's Kubernetes runtime and Kubeflow read the same file. `manifests/profiles/gpu.yaml` is one to
start from; `manifests/profiles/production.yaml` accepts images by digest only.

Environment: `QLORA_RETRAIN_PROFILE`, the file that Airflow uses.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.gpus import CardName
from qlora_retrain.config.kubernetes_names import LabelKey, LabelValue, Name, Namespace
from qlora_retrain.config.platform import DiskGib, ImagesConfig, MemoryGib
from qlora_retrain.config.pod_network import Destination, MessagePods
from qlora_retrain.config.yaml_reader import load_section
from qlora_retrain.core import images, uris
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import Step, StepKind

PROFILE_VARIABLE = "QLORA_RETRAIN_PROFILE"
DEFAULT_DISK_GIB = 100.0
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Folder = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")]
# Environment variables of these names hold secrets in most tools.
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|ACCESS_KEY|API_?KEY|PRIVATE|CREDENTIAL", re.IGNORECASE)


class Toleration(Section):
    """A taint of nodes that a pod tolerates."""

    key: LabelKey = operational(..., "the taint's key, e.g. nvidia.com/gpu")
    operator: Literal["Exists", "Equal"] = operational("Exists", "Equal: only where the taint has `value`")
    value: LabelValue | None = operational(None, "the taint's value; with Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = operational(None, "null: every effect")


class PodConfig(Section):
    """The resources that a kind of pod requests, and the nodes where it may run."""

    cpus: float | None = operational(None, "cores requested; null: the cluster's default", gt=0.0, le=1024)
    memory_gib: MemoryGib | None = operational(
        None, "request and limit: above it the pod is killed; auto: as the plan estimates, at most max_memory_gib"
    )
    max_memory_gib: float | None = operational(
        None,
        "Airflow: a step killed for memory is retried with 1.5 times as much, up to this; null: once, with the same; "
        "with memory_gib: auto the most that a pod gets, and all that it gets where nothing can be estimated",
        gt=0.0,
        le=4096,
    )
    node_selector: dict[LabelKey, LabelValue] = operational({}, "labels that a node must have")
    tolerations: tuple[Toleration, ...] = operational((), "taints of nodes that the pod tolerates")

    @model_validator(mode="after")
    def _auto_has_a_bound(self) -> PodConfig:
        if self.memory_gib == "auto" and self.max_memory_gib is None:
            raise ValueError(
                "memory_gib: auto needs max_memory_gib: the most that a pod may get, as much as a node of yours has"
            )
        return self


class SecretMount(Section):
    """A Kubernetes secret as a read-only folder.

    It never becomes environment variables, because everyone who may read a pod can read those.
    """

    name: Name = operational(..., "the secret's name")
    mount: Folder = operational(..., "the folder in which each of its keys is a file")


class ClusterProfile(ImagesConfig):
    """Everything about a cluster that a pipeline needs.

    Some fields begin with `Airflow:` and have no effect in Kubeflow, which has no such setting for a task.
    """

    # Images and accounts.
    require_digests: bool = operational(False, "refuse images other than name@sha256:...; a tag could be moved")
    image_pull_secrets: tuple[Name, ...] = operational((), "secrets that the images are pulled with")
    service_account: Name | None = operational(None, "the pods' service account; null: the namespace's default")
    publish_service_account: Name | None = operational(
        None, "Airflow: the service account of `publish`, the only step that writes `models/`; null: as the others"
    )
    account_per_step: bool = operational(
        False,
        "Airflow: instead of both, an account for each step, <service_account>-<step>; publish has one for each line, "
        "<service_account>-publish-<line>",
    )
    mirror_service_account: Name | None = operational(
        None,
        "Airflow: the service account of mirrors; null: as the others, with account_per_step <service_account>-mirror",
    )
    messages: MessagePods | None = operational(
        None,
        "Airflow: the tasks of `notify` and `hooks` run in pods of their own, by Airflow's KubernetesExecutor; null: "
        "where its other tasks run",
    )
    egress: tuple[Destination, ...] = operational(
        (),
        "what pods may connect to besides DNS: the store, STS, KMS, trackers, a Hub; `qlora-retrain egress` renders it",
    )
    mirror_egress: tuple[Destination, ...] = operational(
        (), "what the pods of mirrors may connect to besides: the Hub, an MLflow server, or a proxy that knows them"
    )
    namespace: Namespace = operational("qlora-retrain", "Airflow: where the pods are; KFP uses its own")
    priority_class: Name | None = operational(
        None, "Airflow: which pods may preempt which; null: the cluster's default"
    )
    # GPUs.
    gpu_pool: Name | None = operational(None, "Airflow: the pool that counts GPUs in use; null: no pool")
    local_queue: Namespace | None = operational(
        None, "Airflow: the LocalQueue of Kueue in which every pod waits for its turn; null: none"
    )
    gpu_resource: LabelKey | None = operational("nvidia.com/gpu", "the resource name of a GPU; null: no GPUs")
    gpu_card: CardName | None = operational(
        None, "the card of the GPU nodes, e.g. h100: a plan estimates for it; null: platform.yaml's runtime.gpu"
    )
    train_gpus: int = operational(1, "GPUs of the training pod: as many as the lines' train.num_processes", ge=1, le=64)
    # Deadlines; in Airflow each line has its own.
    max_step_hours: float = operational(
        24.0, "Kubeflow: a task other than training is stopped after this", gt=0.0, le=720.0
    )
    max_training_hours: float = operational(
        168.0,
        "Kubeflow: a try of training is stopped two hours after this; train.max_hours may be less",
        gt=0.0,
        le=8760.0,
    )
    # The environment of a step, and its disk.
    env: dict[Variable, str] = operational({}, "settings, e.g. AWS_DEFAULT_REGION; secrets are refused")
    secrets: tuple[SecretMount, ...] = operational((), "folders of files that every step sees")
    key_secrets: Name | None = operational(
        None,
        "secrets with the store's keys, <key_secrets>-<role>, as `qlora-retrain keys export` writes them: a pod sees "
        "that of its own role; null: the store has no keys",
    )
    disk_gib: DiskGib = operational(
        DEFAULT_DISK_GIB,
        "a pod's own disk, for output and checkpoints, and without cache_claim for inputs; auto: as the plan "
        "estimates, on Kubeflow 100",
    )
    storage_class: Name | None = operational(
        None, "Airflow: that disk is a volume of this class, which lives as long as the pod; null: the node's own disk"
    )
    cache_claim: Name | None = operational(
        None, "Airflow: a claim (ReadWriteMany) that keeps fetched inputs between pods; null: each pod fetches its own"
    )
    # Resources by the kind of the step.
    light: PodConfig = operational(PodConfig(), "steps without torch")
    train: PodConfig = operational(PodConfig(), "steps with torch that take no GPU")
    gpu: PodConfig = operational(PodConfig(), "steps that take a GPU; unused where gpu_resource is null")

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            # AWS_SHARED_CREDENTIALS_FILE and the like name a mounted file, which is the right way.
            if _SECRET_NAME.search(name) and not name.endswith(("_FILE", "_PATH")):
                raise ValueError(
                    f"{name} looks like a secret, and everyone who may read a pod can read it; mount it with `secrets`"
                )
            uris.refuse_secrets(text)
        return value

    @model_validator(mode="after")
    def _accounts_have_a_name(self) -> ClusterProfile:
        if self.account_per_step and self.service_account is None:
            raise ValueError("account_per_step: needs service_account, with which the accounts' names begin")
        return self

    @model_validator(mode="after")
    def _digests_where_required(self) -> ClusterProfile:
        # A digest always names the same image, so a plan and its steps cannot run different code.
        for name in ("light_image", "train_image") if self.require_digests else ():
            if not images.has_digest(getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; require_digests allows only name@sha256:<64 hex>, "
                    "as the registry prints it after a push"
                )
        return self

    def account(self, step: Step, line: str) -> str | None:
        """Return the service account of a step's pod."""
        is_publish = step.kind == StepKind.PUBLISH
        if self.account_per_step:
            name = f"{self.service_account}-{step.name.replace('_', '-')}"
            return f"{name}-{line}" if is_publish else name
        return (self.publish_service_account if is_publish else None) or self.service_account

    def mirror_account(self) -> str | None:
        """Return the service account of a mirror's pod."""
        own = f"{self.service_account}-mirror" if self.account_per_step else self.service_account
        return self.mirror_service_account or own

    def key_secret(self, role: str) -> str | None:
        """Return the name of the secret with a role's keys."""
        # Names of secrets have no underscores.
        return f"{self.key_secrets}-{role.replace('_', '-')}" if self.key_secrets else None

    def gpus(self, step: Step) -> int:
        """Return how many GPUs a step requests on this cluster."""
        if not self.gpu_resource:
            return 0
        # A Kubeflow pipeline is compiled before a line, and so its train.num_processes, is known.
        return self.train_gpus if step.section == "train" else step.gpus

    def pod(self, step: Step) -> PodConfig:
        """Return the resources that a step's pod requests."""
        return self.gpu if self.gpus(step) else {"light": self.light, "train": self.train}[step.image]


def quantity(gib: float) -> str:
    """Write an amount as the cluster does: in whole GiB or, rounded up, in whole MiB."""
    return f"{gib:g}Gi" if gib == int(gib) else f"{math.ceil(gib * 1024)}Mi"


def from_environment() -> ClusterProfile:
    """Load the profile that `QLORA_RETRAIN_PROFILE` names.

    Raises:
        UsageError: If the variable is not set, or with every error of the file.
    """
    path = os.environ.get(PROFILE_VARIABLE)
    if not path:
        raise UsageError(
            f"runtime.kind in platform.yaml is kubernetes, and {PROFILE_VARIABLE} is not set: it names the cluster's "
            "profile, a file such as manifests/profiles/production.yaml, wherever Airflow parses or runs DAGs"
        )
    return load(Path(path))


def load(path: Path) -> ClusterProfile:
    """Read a profile.

    Raises:
        UsageError: With every error of the file, one per line.
    """
    return load_section(ClusterProfile, path)
