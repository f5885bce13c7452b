"""A cluster's profile: on which nodes the steps' pods run, what they may take, which secrets they see.

It belongs to a cluster, not to a line; nothing in it changes a result, and it can hold no secret, only the names of
secrets. Airflow's Kubernetes runtime and Kubeflow read the same file. `manifests/profiles/gpu.yaml` is one to start
from, `manifests/profiles/production.yaml` one that takes images by digest alone.

Environment: `QLORA_RETRAIN_PROFILE`, the file that Airflow uses.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.reading import read
from qlora_retrain.config.sections import Images
from qlora_retrain.core import images, uris
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import Step

PROFILE_VARIABLE = "QLORA_RETRAIN_PROFILE"
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Folder = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")]
_SECRET = re.compile(r"SECRET|TOKEN|PASSW|ACCESS_KEY|API_?KEY|PRIVATE|CREDENTIAL", re.IGNORECASE)


class Toleration(Section):
    """A taint of nodes that a pod may run on all the same."""

    key: str = operational(..., "the taint's key, e.g. nvidia.com/gpu")
    operator: Literal["Exists", "Equal"] = operational("Exists", "Equal: only where the taint has `value`")
    value: str | None = operational(None, "the taint's value; with Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = operational(None, "null: every effect")


class Pod(Section):
    """What a kind of pod asks for, and where it may run."""

    cpus: float | None = operational(None, "cores asked for; null: the cluster's default", gt=0.0, le=1024)
    memory_gib: float | None = operational(None, "asked for and allowed: above it the pod is killed", gt=0.0, le=4096)
    max_memory_gib: float | None = operational(
        None,
        "Airflow: a step killed for memory is tried again with half as much more, up to this; null: once, as it was",
        gt=0.0,
        le=4096,
    )
    node_selector: dict[str, str] = operational({}, "labels that a node must have")
    tolerations: tuple[Toleration, ...] = operational((), "taints that are no hindrance")


class Secret(Section):
    """A Kubernetes secret as a read-only folder; never as environment variables, which whoever sees a pod can read."""

    name: Name = operational(..., "the secret's name")
    mount: Folder = operational(..., "the folder in which each of its keys is a file")


class Profile(Images):
    """Everything about a cluster that a pipeline needs. Fields of Airflow alone: KFP has no such setting for a task."""

    require_digests: bool = operational(False, "refuse images that are not name@sha256:..., which nobody can move")
    image_pull_secrets: tuple[Name, ...] = operational((), "secrets that the images are pulled with")
    service_account: Name | None = operational(None, "whom the pods run as; null: the namespace's default")
    publish_service_account: Name | None = operational(
        None, "Airflow: whom `publish` runs as, which alone needs to write `models/`; null: as the others"
    )
    namespace: Name = operational("qlora-retrain", "Airflow: where the pods are; KFP uses its own")
    priority_class: Name | None = operational(
        None, "Airflow: which pods give way to which; null: the cluster's default"
    )
    gpu_pool: Name | None = operational(None, "Airflow: the pool that counts GPUs in use; null: no pool")
    gpu_resource: str | None = operational("nvidia.com/gpu", "what a GPU is called here; null: there are none")
    train_gpus: int = operational(1, "GPUs of the training pod: as many as the lines' train.processes", ge=1, le=64)
    env: dict[Variable, str] = operational({}, "settings, e.g. AWS_DEFAULT_REGION; secrets are refused")
    secrets: tuple[Secret, ...] = operational((), "folders of files that every step sees")
    work_gib: float = operational(
        100.0, "a pod's own disk: output, checkpoints, without cache_claim inputs too", gt=0.0, le=65_536
    )
    storage_class: Name | None = operational(
        None, "Airflow: that disk is a volume of this class, made and removed with the pod; null: the node's own disk"
    )
    cache_claim: Name | None = operational(
        None, "Airflow: a claim (ReadWriteMany) that keeps fetched inputs between pods; null: each pod fetches its own"
    )
    light: Pod = operational(Pod(), "steps without torch")
    train: Pod = operational(Pod(), "steps with torch that take no GPU")
    gpu: Pod = operational(Pod(), "steps that take a GPU; unused where gpu_resource is null")

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if _SECRET.search(name) and not name.endswith(("_FILE", "_PATH")):
                raise ValueError(f"{name} looks like a secret, and whoever sees a pod can read it; use `secrets`")
            uris.refuse_secrets(text)
        return value

    @model_validator(mode="after")
    def _digests_where_required(self) -> Profile:
        for name in ("light_image", "train_image") if self.require_digests else ():
            if not images.by_digest(getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; require_digests wants name@sha256:<64 hex>, as the registry "
                    "prints it after a push"
                )
        return self

    def gpus(self, step: Step) -> int:
        """How many GPUs a step asks for on this cluster."""
        if not self.gpu_resource:
            return 0
        return self.train_gpus if step.section == "train" else step.gpus

    def pod(self, step: Step) -> Pod:
        """What a step's pod asks for."""
        return self.gpu if self.gpus(step) else {"light": self.light, "train": self.train}[step.image]


def of_environment() -> Profile:
    """The profile that `QLORA_RETRAIN_PROFILE` names.

    Raises:
        UsageError: If it names none, or with every error of the file.
    """
    path = os.environ.get(PROFILE_VARIABLE)
    if not path:
        raise UsageError(
            f"runtime.kind is kubernetes, and {PROFILE_VARIABLE} is not set: it names the cluster's profile, a file "
            "such as manifests/profiles/production.yaml, wherever Airflow parses or runs DAGs"
        )
    return load(Path(path))


def load(path: Path) -> Profile:
    """Read a profile.

    Raises:
        UsageError: With every error of the file, one a line.
    """
    return read(Profile, path)
