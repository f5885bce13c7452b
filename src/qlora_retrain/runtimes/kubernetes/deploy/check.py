"""Check a deployment before it is applied: build the overlays, render the pods, and hold both against the rules.

Reads a profile, the overlays and lines; needs no cluster and changes nothing. Returns the findings, and the list of
what is left to do by hand.

Command: `qlora-retrain deploy-check --profile manifests/profiles/production.yaml`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.config import platform
from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.platform import PlatformConfig
from qlora_retrain.config.yaml_reader import load_section
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import StepKind
from qlora_retrain.runtimes.kubernetes.deploy import access_rules, by_hand, overlay, rules
from qlora_retrain.runtimes.kubernetes.deploy.rules import Deployment
from qlora_retrain.runtimes.kubernetes.findings import Check, Finding
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod, step_pods

if TYPE_CHECKING:
    from qlora_retrain.config.line import LineConfig

KUBERNETES = "1.32"  # whose schemas are used; every document of the overlays has been stable since 1.30
_RULES: tuple[tuple[str, str, Callable[[Deployment], Iterable[Finding]]], ...] = (
    ("schemas", "every document and every pod is valid, without an unknown field", rules.schema_faults),
    ("pod security", "the namespace enforces a standard, and every pod is `restricted`", rules.security_faults),
    ("images", "images are named as the profile demands", rules.image_faults),
    ("quota", "the largest pods and a full pool fit the quota and the limits", rules.quota_faults),
    ("accounts", "every account that a pod runs as exists", access_rules.account_faults),
    ("roles", "bindings name what exists, and Airflow may do exactly what it must", access_rules.role_faults),
    ("objects", "the overlay creates what the profile names", access_rules.object_faults),
    ("nodes", "the profile states labels or taints of the GPU nodes", rules.node_faults),
    ("network", "everything is closed but what the profile lists", rules.network_faults),
    ("lines", "the lines fit the profile", rules.line_faults),
)


@dataclass(frozen=True, slots=True)
class Report:
    """The result for one overlay.

    Attributes:
        overlay: Its folder.
        findings: What the rules say.
        by_hand: What is left to do.
    """

    overlay: Path
    findings: list[Finding]
    by_hand: list[str]


def check(
    profile_path: Path, overlay_folder: Path, lines: Sequence[LineConfig] = (), kubernetes: str = KUBERNETES
) -> Report:
    """Check a profile with an overlay.

    Args:
        profile_path: The profile.
        overlay_folder: The overlay.
        lines: Lines that are to run there; without any, those that the overlay has accounts for.
        kubernetes: The version whose schemas are used.

    Raises:
        UsageError: If a file cannot be read or built.
    """
    built, (profile, requires_digests) = overlay.build(overlay_folder), load_profile(profile_path)
    names = [config.line for config in lines] or _lines_of_accounts(built, profile)
    settings = _load_platform(overlay_folder)
    pods = [pod for name in names for pod in step_pods(profile, name, settings.runtime_of(name))]
    if built.is_kubeflow:
        pods = [_as_on_kubeflow(pod) for pod in pods]
    deployment = Deployment(built, profile, profile_path, requires_digests, pods, kubernetes, tuple(lines))
    findings = [
        finding
        for name, promise, rule in _RULES
        for finding in Check(name, promise, lambda rule=rule: rule(deployment)).findings()  # type: ignore[misc]
    ]
    return Report(overlay_folder, findings, by_hand.steps(deployment))


def load_profile(path: Path) -> tuple[ClusterProfile, bool]:
    """Read a profile whose images may still be tags; return whether it demands digests.

    Raises:
        UsageError: With every other error of the file.
    """
    demands: list[bool] = []

    def without_demand(document: dict[str, object]) -> dict[str, object]:
        demands.append(document.get("require_digests") is True)
        # A value that is no boolean is the model's to refuse.
        return {**document, "require_digests": False} if demands[0] else document

    profile = load_section(ClusterProfile, path, prepare=without_demand)
    return profile, demands[0]


def default_overlays(profile_path: Path) -> list[Path]:
    """Return the overlay of the profile's name, and that of Kubeflow where its egress was rendered from the profile.

    Raises:
        UsageError: If there is none.
    """
    folder = profile_path.resolve().parents[1] / "overlays"
    own, kubeflow = folder / profile_path.stem, folder / "kfp" / "egress.yaml"
    overlays = [own] if own.is_dir() else []
    if kubeflow.is_file() and kubeflow.read_text(encoding="utf-8").partition("\n")[0].endswith(f"/{profile_path.name}"):
        overlays.append(kubeflow.parent)
    if not overlays:
        raise UsageError(f"{own}: there is no overlay of the profile's name; pass --overlay FOLDER")
    return overlays


def _load_platform(overlay_folder: Path) -> PlatformConfig:
    """Return the platform's settings: those of the environment, else those beside the overlays, as Airflow has them."""
    beside = overlay_folder.resolve().parents[1] / "platform.yaml"
    if os.environ.get(platform.PLATFORM_VARIABLE) or not beside.is_file():
        return platform.load()
    return load_section(PlatformConfig, beside)


def _lines_of_accounts(built: overlay.Overlay, profile: ClusterProfile) -> list[str]:
    """Return the lines for which the overlay has an account of `publish`; a name of no meaning where it has none."""
    (publish,) = [step for step in graph.STEPS if step.kind == StepKind.PUBLISH]
    prefix = profile.account(publish, "") if profile.account_per_step else None
    names = sorted(built.names("ServiceAccount"))
    return [name.removeprefix(prefix) for name in names if prefix and name.startswith(prefix)] or ["my-line"]


def _as_on_kubeflow(pod: StepPod) -> StepPod:
    """Return the pod without what Kubeflow cannot set: requests of the node's disk, volumes of classes and claims."""
    spec = {
        **pod.spec,
        "volumes": [v for v in pod.spec["volumes"] if not {"ephemeral", "persistentVolumeClaim"} & set(v)],
    }
    (container,) = spec["containers"]
    resources = {
        side: {name: text for name, text in amounts.items() if name != "ephemeral-storage"}
        for side, amounts in container["resources"].items()
    }
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] in volumes]
    spec["containers"] = [{**container, "resources": resources, "volumeMounts": mounts}]
    return StepPod(pod.step, {**pod.manifest, "spec": spec}, pod.gpus)
