"""What goes wrong with clusters and stores: each spoils one thing, and says what the doctor must then name.

`test_doctor.py` tries each of them in this process, `tests/containers/test_doctor.py` the first ten in a container.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import yaml

from qlora_retrain.pipeline.code_identity import project_root
from tests.manifests.overlays import build_overlay
from tests.runtimes.kubernetes.applied_cluster import AppliedCluster
from tests.runtimes.kubernetes.spoiled_s3 import SpoiledS3

DIGEST = "@sha256:" + "7" * 64
NOWHERE = "http://127.0.0.1:9"


@dataclass
class Scene:
    """A cluster with the production overlay, its store, and its profile with images by digest."""

    cluster: AppliedCluster
    s3: SpoiledS3
    profile: Path

    @classmethod
    def prepare(cls, cluster: AppliedCluster, s3: SpoiledS3, folder: Path) -> Scene:
        cluster.apply(build_overlay("production"))
        scene = cls(cluster, s3, folder / "production.yaml")
        document = yaml.safe_load((project_root() / "manifests" / "profiles" / "production.yaml").read_text())
        images = {name: document[name].rpartition(":")[0] + DIGEST for name in ("light_image", "train_image")}
        scene.profile.write_text(yaml.safe_dump({**document, **images}))
        return scene

    def change_profile(self, **changes: object) -> None:
        document = yaml.safe_load(self.profile.read_text())
        self.profile.write_text(yaml.safe_dump({**document, **changes}))


@dataclass(frozen=True)
class Misconfiguration:
    """One thing that is wrong.

    Attributes:
        name: Its name.
        spoil: Does it.
        check: The check whose fault names it.
        text: A part of that fault's message.
        more_faults: Further checks that see it too.
    """

    name: str
    spoil: Callable[[Scene], object]
    check: str
    text: str
    more_faults: frozenset[str] = frozenset()


def _send_store_away(scene: Scene) -> None:
    scene.s3.url = NOWHERE


def _refuse_writes(scene: Scene) -> None:
    scene.s3.refuses_writes = True


def _ignore_conditions(scene: Scene) -> None:
    scene.s3.ignores_conditions = True


def _take_permission(scene: Scene) -> None:
    scene.cluster.document("Role", "qlora-retrain-tasks")["rules"][0]["verbs"].remove("patch")


def _shrink_quota(scene: Scene) -> None:
    scene.cluster.document("ResourceQuota", "qlora-retrain")["spec"]["hard"]["requests.memory"] = "100Gi"


def _take_label(scene: Scene) -> None:
    scene.cluster.emulator.nodes[1]["metadata"]["labels"].pop("nvidia.com/gpu.present")


def _be_stricter(scene: Scene) -> None:
    scene.cluster.emulator.stricter = True


def _shift_clock(scene: Scene) -> None:
    scene.cluster.emulator.clock_shift = timedelta(minutes=7)


def _shift_stores_clock(scene: Scene) -> None:
    scene.s3.clock_shift = timedelta(minutes=-7)


def _taint_node(scene: Scene) -> None:
    scene.cluster.emulator.nodes[0]["spec"]["taints"] = [{"key": "team", "value": "a", "effect": "NoSchedule"}]


def _shrink_node(scene: Scene) -> None:
    scene.cluster.emulator.nodes[1]["status"]["allocatable"]["memory"] = "60Gi"


def _add_sidecar(scene: Scene) -> None:
    scene.cluster.emulator.sidecar = "istio-proxy"


def _open_port(scene: Scene) -> None:
    scene.cluster.document("NetworkPolicy", "egress-store")["spec"]["egress"][0]["ports"][0]["port"] = 9000


TEN = (
    Misconfiguration("store away", _send_store_away, "store", "s3://doctor/qlora: expected that it answers, found"),
    Misconfiguration("no write right", _refuse_writes, "write", "expected the right to write and to delete, found"),
    Misconfiguration("no conditional writes", _ignore_conditions, "conditions", "server ignores conditional writes"),
    Misconfiguration(
        "a missing role",
        lambda scene: scene.cluster.remove("RoleBinding", "qlora-retrain-triggerer"),
        "roles",
        "account airflow-triggerer in airflow: expected that it may delete pods, get pods, get pods/log, watch events",
    ),
    Misconfiguration(
        "a missing service account",
        lambda scene: scene.cluster.remove("ServiceAccount", "qlora-retrain-evaluate"),
        "accounts",
        "ServiceAccount qlora-retrain-evaluate in qlora-retrain: expected the account of evaluate's pod, found none",
        frozenset({"dry run"}),
    ),
    Misconfiguration(
        "quota below the largest pod",
        _shrink_quota,
        "quota",
        "ResourceQuota qlora-retrain, requests.memory: expected at least 128Gi, as the largest pod of train_qlora",
    ),
    Misconfiguration(
        "no node for a selector",
        _take_label,
        "nodes",
        "expected a node with kubernetes.io/arch=amd64, nvidia.com/gpu.present=true, found none among 2 nodes",
    ),
    Misconfiguration(
        "image not by digest",
        lambda scene: scene.change_profile(train_image="registry.example/train:0.1.0"),
        "images",
        "train_image of the profile: expected name@sha256:<64 hex>, found registry.example/train:0.1.0",
        frozenset({"dry run"}),
    ),
    Misconfiguration(
        "Pod Security too strict", _be_stricter, "pod security", 'violates PodSecurity "restricted:v1.30"'
    ),
    Misconfiguration(
        "clock skew",
        _shift_clock,
        "clock",
        "the clock of the API server: expected at most 60 seconds of difference, found 4",
    ),
)
FURTHER = (
    Misconfiguration("the store's clock", _shift_stores_clock, "clock", "the clock of the store: expected at most 60"),
    Misconfiguration(
        "a missing permission", _take_permission, "roles", "account airflow-scheduler in airflow: expected"
    ),
    Misconfiguration(
        "a taint", _taint_node, "nodes", "found taints on all 2 nodes with its labels: nvidia.com/gpu=:No"
    ),
    Misconfiguration("no large node", _shrink_node, "nodes", "found at best a node with memory 60Gi"),
    Misconfiguration("a sidecar", _add_sidecar, "dry run", "its own container alone, found also istio-proxy"),
    Misconfiguration(
        "an open port", _open_port, "network", "NetworkPolicy egress-store: expected what the profile lists"
    ),
    Misconfiguration(
        "no claim",
        lambda scene: scene.cluster.remove("PersistentVolumeClaim", "qlora-retrain-cache"),
        "storage",
        "PersistentVolumeClaim qlora-retrain-cache in qlora-retrain: expected the claim of the cache, found none",
    ),
)
