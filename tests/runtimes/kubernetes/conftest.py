"""A cluster of the tests' own, a plan, and the tasks of its steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qlora_retrain.config.profile import Profile
from qlora_retrain.config.profile import load as load_profile
from qlora_retrain.config.sections import RuntimeConfig
from qlora_retrain.pipeline import plan
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes import canaries

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    from tests.runtimes.kubernetes.cluster import running

    for made in running(tmp_path):
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        # Both clients read the variable while they are imported.
        for module in ("kubernetes.config.kube_config", "kubernetes_asyncio.config.kube_config"):
            monkeypatch.setattr(importlib.import_module(module), "KUBE_CONFIG_DEFAULT_LOCATION", str(made.kubeconfig))
        for name, value in canaries.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def cluster_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One more, in a pod of which this is: there is no kubeconfig, but a service account's token."""
    from tests.runtimes.kubernetes.cluster import running

    for made in running(tmp_path, secure=True):
        (tmp_path / "token").write_text(canaries.SERVICE_ACCOUNT)
        monkeypatch.delenv("KUBECONFIG", raising=False)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", made.url.rpartition(":")[2])
        for client in ("kubernetes", "kubernetes_asyncio"):
            kubeconfig = importlib.import_module(f"{client}.config.kube_config")
            monkeypatch.setattr(kubeconfig, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
            account = importlib.import_module(f"{client}.config.incluster_config")
            monkeypatch.setattr(account, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
            monkeypatch.setattr(account, "SERVICE_CERT_FILENAME", str(made.authority))
        yield made


@pytest.fixture
def plan_in(tmp_path: Path, tickets: Path, tiny_model: Path) -> Callable[..., Plan]:
    """Make the plan of a line in the store of a URI, with overrides."""
    path = tmp_path / "line.yaml"
    sources = {"raw_data": str(tickets), "base_model": str(tiny_model)}
    data = {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256}
    path.write_text(yaml.safe_dump({"line": "tickets", "sources": sources, "data": data}))
    return lambda root, *overrides: plan.make(path, root, overrides=overrides)


@pytest.fixture
def made(plan_in: Callable[..., Plan], tmp_path: Path) -> Plan:
    return plan_in((tmp_path / "store").as_uri())


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a step's task anew, as every process does that takes it up."""
    from qlora_retrain.runtimes.airflow import kubernetes

    monkeypatch.setattr(kubernetes, "_POLL_SECONDS", 0.1)

    def make(name: str = "validate_data", **cluster: object) -> Any:
        profile = load_profile(project_root() / "manifests" / "profiles" / "gpu.yaml")
        document = {**profile.model_dump(exclude_unset=True), **cluster}
        return kubernetes.KubernetesStepOperator(
            task_id=name, step=name, line="tickets", runtime=RuntimeConfig(), profile=Profile.model_validate(document)
        )

    return make
