"""A message's task in a pod of its own: as Airflow's executor builds it, from the DAG as the scheduler keeps it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.config import cluster_profile
from qlora_retrain.config.cluster_profile import PROFILE_VARIABLE
from qlora_retrain.config.platform import PLATFORM_VARIABLE
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.kubernetes import egress

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
MESSAGES = {
    "service_account": "airflow-messages",
    "egress": [
        {"name": "airflow", "namespace": "airflow", "pods": {"component": "api-server"}, "ports": [8080]},
        {"name": "ops", "blocks": ["192.0.2.20/32"]},
    ],
}
PLATFORM = {
    "notify": [{"events": ["failure"], "connection": "ops", "kind": "webhook"}],
    "hooks": [{"line": "tickets", "connection": "server"}],
}


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a platform with messages and hooks, and a profile that gives them pods; return the profile."""
    profile, platform = tmp_path / "profile.yaml", tmp_path / "platform.yaml"
    profile.write_text(yaml.safe_dump({"messages": MESSAGES}))
    platform.write_text(yaml.safe_dump(PLATFORM))
    monkeypatch.setenv(PROFILE_VARIABLE, str(profile))
    monkeypatch.setenv(PLATFORM_VARIABLE, str(platform))
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "LocalExecutor,KubernetesExecutor")
    monkeypatch.setenv("AIRFLOW__KUBERNETES_EXECUTOR__NAMESPACE", "airflow")
    return profile


def tasks() -> dict[str, Any]:
    """Return the tasks of messages and hooks, of a run and of a move, as the scheduler reads them from its database."""
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization

    from qlora_retrain.runtimes.airflow import notifications

    dag = DAG("tickets", schedule=None)
    last = EmptyOperator(task_id="publish", dag=dag)
    notifications.add_tasks(dag, "tickets", last)
    notifications.add_move_hooks(dag, last)
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    return {task_id: task for task_id, task in stored.task_dict.items() if task_id != "publish"}


def pod_of(task: Any) -> Any:
    """Build the pod as the KubernetesExecutor does, over a template with Airflow's own account."""
    from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
    from kubernetes.client import models as k8s

    template = k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(name="template", labels={"component": "worker"}),
        spec=k8s.V1PodSpec(
            containers=[k8s.V1Container(name="base", image="apache/airflow:3.3.2")],
            service_account_name="airflow-worker",
        ),
    )
    return PodGenerator.construct_pod(
        dag_id="tickets",
        task_id=task.task_id,
        pod_id="tickets-message",
        try_number=1,
        kube_image="apache/airflow:3.3.2",
        date=datetime(2026, 1, 31, 3, tzinfo=UTC),
        args=["python", "-m", "airflow.sdk.execution_time.execute_workload"],
        pod_override_object=PodGenerator.from_obj(task.executor_config),
        base_worker_pod=template,
        namespace="airflow",
        scheduler_job_id="1",
    )


def test_every_message_runs_in_a_pod_with_its_own_account_and_no_token_of_the_cluster() -> None:
    by_id = tasks()
    assert set(by_id) == {"notify_ops", "hook_server", "hooks"}
    assert {task.executor for task in by_id.values()} == {"KubernetesExecutor"}
    for task in by_id.values():
        pod = pod_of(task)
        (container,) = pod.spec.containers
        assert pod.spec.service_account_name == "airflow-messages"
        assert pod.spec.automount_service_account_token is False
        assert (container.name, container.image) == ("base", "apache/airflow:3.3.2")
        assert container.args[-1] == "airflow.sdk.execution_time.execute_workload"
        assert pod.metadata.labels["component"] == "worker"


def test_the_policy_selects_these_pods_and_opens_names_and_what_the_profile_lists(cluster: Path) -> None:
    pods = cluster_profile.load(cluster).messages
    assert pods is not None
    policy = egress.message_policy(pods)
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert all(selected.items() <= pod_of(task).metadata.labels.items() for task in tasks().values())
    assert policy["metadata"]["namespace"] == "airflow"
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    dns, airflow, ops = policy["spec"]["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert airflow["to"][0]["podSelector"]["matchLabels"] == {"component": "api-server"}
    assert (ops["to"], ops["ports"]) == ([{"ipBlock": {"cidr": "192.0.2.20/32"}}], [{"protocol": "TCP", "port": 443}])


@pytest.mark.parametrize(
    ("configured", "name"),
    [
        ("KubernetesExecutor", "KubernetesExecutor"),
        (
            "CeleryExecutor, pods:airflow.providers.cncf.kubernetes.executors.kubernetes_executor.KubernetesExecutor",
            "pods",
        ),
    ],
)
def test_the_executor_has_the_name_that_airflow_gives_it(
    configured: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", configured)
    assert {task.executor for task in tasks().values()} == {name}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AIRFLOW__CORE__EXECUTOR", "LocalExecutor", "expected LocalExecutor,KubernetesExecutor"),
        ("AIRFLOW__KUBERNETES_EXECUTOR__NAMESPACE", "other", "namespace of the cluster's profile is airflow"),
    ],
)
def test_an_airflow_that_would_send_it_from_elsewhere_is_refused(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=words):
        tasks()


def test_without_the_section_messages_run_as_any_other_task(cluster: Path) -> None:
    cluster.write_text("{}\n")
    assert all(task.executor is None and not task.executor_config for task in tasks().values())
