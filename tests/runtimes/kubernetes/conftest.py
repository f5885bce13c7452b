"""Fixtures: a fake cluster, a plan, and the Airflow tasks of its steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.cluster_profile import load as load_profile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes import canaries

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    from tests.runtimes.kubernetes.cluster import running_cluster

    for cluster in running_cluster(tmp_path):
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        # Both clients read the variable while they are imported, so for them it is too late.
        for module in ("kubernetes.config.kube_config", "kubernetes_asyncio.config.kube_config"):
            monkeypatch.setattr(
                importlib.import_module(module), "KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig)
            )

        for name, value in canaries.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield cluster


@pytest.fixture
def cluster_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A cluster as seen from one of its pods: there is no kubeconfig, but a service account's token."""
    from tests.runtimes.kubernetes.cluster import running_cluster

    # Over HTTPS, because the client of a service account speaks nothing else.
    for cluster in running_cluster(tmp_path, secure=True):
        (tmp_path / "token").write_text(canaries.SERVICE_ACCOUNT)
        monkeypatch.delenv("KUBECONFIG", raising=False)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", cluster.url.rpartition(":")[2])

        for client in ("kubernetes", "kubernetes_asyncio"):
            kubeconfig = importlib.import_module(f"{client}.config.kube_config")
            monkeypatch.setattr(kubeconfig, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
            account = importlib.import_module(f"{client}.config.incluster_config")
            monkeypatch.setattr(account, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
            monkeypatch.setattr(account, "SERVICE_CERT_FILENAME", str(cluster.authority))
        yield cluster


@pytest.fixture
def plan_in(tmp_path: Path, tickets: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Make the plan of a line in the store at a URI, with overrides; it is Airflow's store from now on."""
    path = tmp_path / "line.yaml"
    sources = {"raw_data": str(tickets), "base_model": str(tiny_model)}
    data = {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256}
    path.write_text(yaml.safe_dump({"line": "tickets", "sources": sources, "data": data}))

    def make(root: str, *overrides: str) -> Plan:
        monkeypatch.setenv("QLORA_RETRAIN_ROOT", root)
        return make_plan.make_plan(path, root, overrides=overrides)

    return make


@pytest.fixture
def plan(plan_in: Callable[..., Plan], tmp_path: Path) -> Plan:
    return plan_in((tmp_path / "store").as_uri())


@pytest.fixture
def make_task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a step's task afresh, as every process does that runs a part of it."""
    from qlora_retrain.runtimes.airflow import kubernetes, pod_step
    from qlora_retrain.runtimes.kubernetes import pod_api

    monkeypatch.setattr(pod_step, "_POLL_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(pod_api, "_PAUSES_WHILE_REFUSED_SECONDS", (0, 0))

    def make(name: str = "validate_data", **cluster: object) -> Any:
        profile = load_profile(project_root() / "manifests" / "profiles" / "gpu.yaml")
        document = {**profile.model_dump(exclude_unset=True), **cluster}
        return kubernetes.KubernetesStepOperator(
            task_id=name,
            step=name,
            line="tickets",
            runtime=RuntimeConfig(),
            profile=ClusterProfile.model_validate(document),
        )

    return make
