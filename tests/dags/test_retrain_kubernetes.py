"""A line on Kubernetes as a DAG: the cluster's profile, the pool that counts GPUs, and errors for what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from qlora_retrain.config.cluster_profile import load as load_profile
from qlora_retrain.core import graph

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
PROJECT = Path(__file__).resolve().parents[2]
PROFILE = PROJECT / "manifests" / "profiles" / "gpu.yaml"


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "tickets.yaml").write_text(
        "line: tickets\nsources: {raw_data: tickets.jsonl, base_model: model}\n"
    )
    (tmp_path / "platform.yaml").write_text("runtime: {kind: kubernetes}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(tmp_path / "pipelines"))
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))


def parsed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dag_file", PROJECT / "dags" / "retrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_steps_are_pods_and_those_with_a_gpu_take_a_slot_of_the_pool_for_each(
    line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_PROFILE", str(PROFILE))
    dag = parsed().DAGS["tickets"]
    profile = load_profile(PROFILE)
    for step in graph.STEPS:
        task = dag.get_task(step.name)
        assert type(task).__name__ == "KubernetesStepOperator"
        assert (task.deferrable, task.on_finish_action.value) == (True, "delete_succeeded_pod")
        gpus = profile.gpus(step)
        assert (task.pool, task.pool_slots) == (("gpu", gpus) if gpus else ("default_pool", 1))


@pytest.mark.parametrize("sizes", ["", ", memory_gib: auto, disk_gib: auto"])
def test_airflow_accepts_and_serializes_the_dag(
    line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: str
) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    monkeypatch.setenv("QLORA_RETRAIN_PROFILE", str(PROFILE))
    (tmp_path / "platform.yaml").write_text(f"runtime: {{kind: kubernetes{sizes}}}\n")
    stored = str(DagSerialization.to_dict(parsed().DAGS["tickets"]))
    assert "KubernetesStepOperator" in stored


def test_a_line_whose_cluster_is_not_named_fails_and_says_what_is_missing(
    line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QLORA_RETRAIN_PROFILE", raising=False)
    dag = parsed().DAGS["tickets"]
    assert "broken" in dag.tags
    assert "QLORA_RETRAIN_PROFILE is not set" in (dag.doc_md or "")
