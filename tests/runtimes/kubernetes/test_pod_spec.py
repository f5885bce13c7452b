"""Every pod that the operator would submit: valid, confined, without a secret, and equal to the reviewed golden file.

After an intended change, run `QLORA_RETRAIN_ACCEPT_PODS=1 pytest tests/runtimes/kubernetes/test_pod_spec.py` and read
the difference.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.cluster_profile import load as load_profile
from qlora_retrain.config.line import load
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.kubernetes.pod_security import APPARMOR, restricted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
PROJECT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "pods"
LINES = sorted((PROJECT / "pipelines").glob("*.yaml"))
STEPS = [step.name for step in graph.STEPS]
KUBERNETES = "1.32"
DIGEST = "@sha256:" + "7" * 64


def repository_profile(name: str) -> ClusterProfile:
    """Load a profile of the repository; in the production one, replace the images' tags by a digest."""
    path = PROJECT / "manifests" / "profiles" / f"{name}.yaml"
    if name != "production":
        return load_profile(path)
    document = yaml.safe_load(path.read_text())
    images = {kind: document[kind].rpartition(":")[0] + DIGEST for kind in ("light_image", "train_image")}
    return ClusterProfile.model_validate({**document, **images})


def render_pod(step: str, line: str, profile: ClusterProfile, runtime: RuntimeConfig, **kwargs: Any) -> dict[str, Any]:
    """Render the pod as the operator would send it, for one fixed run."""
    from kubernetes.client import ApiClient

    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

    task = KubernetesStepOperator(task_id=step, step=step, line=line, runtime=runtime, profile=profile, **kwargs)
    task.prepare_pod(
        "s3://models/team/runs/20260131T030000Z-0123456789ab/plan.json", "c" * 64, "20260131T030000Z-0123456789ab"
    )

    pod = ApiClient().sanitize_for_serialization(task.build_pod_request_obj(dry_run=True))
    assert isinstance(pod, dict)
    pod["metadata"]["labels"].pop("airflow_version")  # it changes with every update of Airflow
    return pod


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("profile_name", ["gpu", "production"])
@pytest.mark.parametrize("line", LINES, ids=lambda path: path.stem)
def test_every_pod_of_every_line_is_valid_and_restricted(line: Path, profile_name: str, step: str) -> None:
    config = load(line)
    pod = render_pod(step, config.line, repository_profile(profile_name), RuntimeConfig())
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert restricted(pod) == []
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["restartPolicy"] == "Never"
    assert len(pod["metadata"]["name"]) <= 63


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        ({"privileged": True}, "privileged"),
        ({"allowPrivilegeEscalation": True}, "escalation"),
        ({"allowPrivilegeEscalation": None}, "escalation"),
        ({"capabilities": {"drop": ["NET_RAW"]}}, "capabilities"),
        ({"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}, "added"),
        ({"runAsUser": 0}, "root"),
        ({"runAsNonRoot": False}, "runAsNonRoot"),
        ({"seccompProfile": {"type": "Unconfined"}}, "seccomp"),
        ({"appArmorProfile": {"type": "Unconfined"}}, "AppArmor"),
        ({"seLinuxOptions": {"type": "spc_t"}}, "SELinux"),
        ({"seLinuxOptions": {"user": "system_u"}}, "SELinux"),
        ({"windowsOptions": {"hostProcess": True}}, "hostProcess"),
        ({"procMount": "Unmasked"}, "procMount"),
    ],
)
def test_the_check_of_pod_security_finds_what_a_container_may_not(changes: dict[str, Any], violation: str) -> None:
    pod = render_pod("train_qlora", "tickets", repository_profile("gpu"), RuntimeConfig())
    (container,) = pod["spec"]["containers"]
    bad = {**container, "name": "bad", "securityContext": {**container["securityContext"], **changes}}
    for spec in (
        {"containers": [bad]},
        {"initContainers": [bad]},
        {"ephemeralContainers": [bad]},
    ):
        assert restricted({**pod, "spec": {**pod["spec"], **spec}}) == [f"bad: {violation}"]


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        ({"hostNetwork": True}, "pod: hostNetwork"),
        ({"hostPID": True}, "pod: hostPID"),
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volume host"),
        ({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, "pod: sysctl kernel.msgmax"),
        ({"securityContext": {"runAsUser": 0}}, "pod: root"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "pod: seccomp"),
        ({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}, "pod: AppArmor"),
        ({"securityContext": {"seLinuxOptions": {"role": "system_r"}}}, "pod: SELinux"),
        ({"securityContext": {"windowsOptions": {"hostProcess": True}}}, "pod: hostProcess"),
    ],
)
def test_the_check_of_pod_security_finds_what_a_pod_may_not(changes: dict[str, Any], violation: str) -> None:
    pod = render_pod("train_qlora", "tickets", repository_profile("gpu"), RuntimeConfig())
    assert restricted({**pod, "spec": {**pod["spec"], **changes}}) == [violation]
    annotated = {**pod["metadata"], "annotations": {f"{APPARMOR}base": "unconfined"}}
    assert restricted({**pod, "metadata": annotated}) == [f"pod: annotation {APPARMOR}base"]


def test_the_check_of_pod_security_takes_what_the_standard_allows() -> None:
    pod = render_pod("train_qlora", "tickets", repository_profile("gpu"), RuntimeConfig())
    (container,) = pod["spec"]["containers"]
    allowed = {
        **container["securityContext"],
        "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
        "seLinuxOptions": {"type": "container_t", "level": "s0:c1,c2"},
        "appArmorProfile": {"type": "RuntimeDefault"},
    }
    pod_context = {**pod["spec"]["securityContext"], "sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}]}
    spec = {**pod["spec"], "securityContext": pod_context, "containers": [{**container, "securityContext": allowed}]}
    assert restricted({**pod, "spec": spec}) == []

    context_without_seccomp = {
        key: value for key, value in container["securityContext"].items() if key != "seccompProfile"
    }
    spec = {"containers": [{**container, "securityContext": context_without_seccomp}]}
    assert restricted({"metadata": {}, "spec": spec}) == ["base: no seccomp"], (
        "it is neither in the pod's security context nor in the container's"
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("profile_name", ["gpu", "production"])
def test_the_pods_are_those_that_somebody_reviewed(profile_name: str, step: str) -> None:
    file = GOLDEN / profile_name / f"{step}.yaml"
    text = yaml.safe_dump(render_pod(step, "tickets", repository_profile(profile_name), RuntimeConfig()), width=120)
    if os.environ.get("QLORA_RETRAIN_ACCEPT_PODS"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


def test_gpus_are_asked_for_where_the_graph_does_and_nowhere_else() -> None:
    for profile in (
        repository_profile("gpu"),
        repository_profile("gpu").model_copy(update={"gpu_resource": None}),
    ):
        for step in graph.STEPS:
            pod = render_pod(step.name, "tickets", profile, RuntimeConfig())["spec"]
            resources = pod["containers"][0]["resources"]
            expected = str(step.gpus) if step.gpus and profile.gpu_resource else None
            assert resources["limits"].get("nvidia.com/gpu") == expected
            assert resources["requests"].get("nvidia.com/gpu") == expected
            assert bool(pod.get("tolerations")) == bool(expected)


def test_the_lines_memory_disk_and_cores_go_before_the_profiles() -> None:
    runtime = RuntimeConfig(kind="kubernetes", memory_gib=20, disk_gib=30, cpus=1.5)
    pod = render_pod("validate_data", "tickets", repository_profile("gpu"), runtime)["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "20Gi", "ephemeral-storage": "32Gi"}, "30, 1 for /tmp and 1 for the log"
    assert resources["requests"] == {"cpu": "1.5", "memory": "20Gi", "ephemeral-storage": "32Gi"}
    assert {v["name"]: v.get("emptyDir") for v in pod["volumes"]}["work"] == {"sizeLimit": "30Gi"}

    # With a volume of its own, the pod needs the node's disk only for /tmp and the log.
    pod = render_pod("validate_data", "tickets", repository_profile("production"), runtime)["spec"]
    claim = pod["volumes"][0]["ephemeral"]["volumeClaimTemplate"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "30Gi"}}
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["ephemeral-storage"] == resources["limits"]["ephemeral-storage"] == "2Gi"


@pytest.mark.parametrize("profile_name", ["gpu", "production"])
def test_a_step_works_on_the_pods_own_disk_wherever_the_cache_is(profile_name: str) -> None:
    (container,) = render_pod("train_qlora", "tickets", repository_profile(profile_name), RuntimeConfig())["spec"][
        "containers"
    ]
    variables = {item["name"]: item["value"] for item in container["env"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}

    def volume_of(variable: str) -> str:
        return next(mounts[str(path)] for path in Path(variables[variable]).parents if str(path) in mounts)

    assert volume_of("QLORA_RETRAIN_WORK") == "work"
    assert mounts.get(variables["QLORA_RETRAIN_CACHE"]) == ("cache" if profile_name == "production" else None)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("profile_name", ["gpu", "production"])
def test_no_pod_is_evicted_while_its_volumes_and_its_log_are_within_their_sizes(profile_name: str, step: str) -> None:
    """A kubelet adds up what a pod has on the node's disk, and evicts the pod above its limit."""
    pod = render_pod(step, "tickets", repository_profile(profile_name), RuntimeConfig())["spec"]
    empty_dirs = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
    volume_bytes = sum(parse_quantity(e["sizeLimit"]) for e in empty_dirs if e.get("medium") != "Memory")
    log_bytes = 50 * 2**20  # the kubelet's own default: five files of 10 MiB
    assert volume_bytes + log_bytes <= parse_quantity(pod["containers"][0]["resources"]["limits"]["ephemeral-storage"])


def test_publish_alone_runs_as_the_account_that_may_write_versions() -> None:
    accounts = {
        s: render_pod(s, "tickets", repository_profile("gpu"), RuntimeConfig())["spec"]["serviceAccountName"]
        for s in STEPS
    }
    assert {step for step, account in accounts.items() if account == "qlora-retrain-publish"} == {"publish"}
    assert {account for step, account in accounts.items() if step != "publish"} == {"qlora-retrain"}


def test_in_production_each_step_has_an_account_and_publish_one_for_each_line() -> None:
    accounts = {
        (s, line): render_pod(s, line, repository_profile("production"), RuntimeConfig())["spec"]["serviceAccountName"]
        for s in STEPS
        for line in ("tickets", "mails")
    }
    assert accounts["train_qlora", "tickets"] == accounts["train_qlora", "mails"] == "qlora-retrain-train-qlora"
    assert accounts["publish", "tickets"] == "qlora-retrain-publish-tickets"
    assert accounts["publish", "mails"] == "qlora-retrain-publish-mails"
    assert len(set(accounts.values())) == len(STEPS) + 1


def test_nothing_of_the_workers_environment_is_in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "canary-of-the-worker")
    for step in STEPS:
        assert "canary" not in str(render_pod(step, "tickets", repository_profile("gpu"), RuntimeConfig()))


def test_a_sidecar_that_airflow_adds_is_as_confined_as_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods have no sidecar, because no task pushes an XCom; this test adds one as Airflow would."""
    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", '{"conn_type": "kubernetes"}')
    monkeypatch.setattr(
        KubernetesStepOperator, "do_xcom_push", property(lambda self: True, lambda self, value: None), raising=False
    )
    pod = render_pod("publish", "tickets", repository_profile("gpu"), RuntimeConfig())
    assert [container["name"] for container in pod["spec"]["containers"]] == ["base", "airflow-xcom-sidecar"]
    assert restricted(pod) == []


def test_the_production_profile_is_refused_until_its_images_are_digests() -> None:
    with pytest.raises(
        UsageError, match=r"light_image is 'registry\.example/.*:0\.1\.0'; require_digests allows only name@"
    ):
        load_profile(PROJECT / "manifests" / "profiles" / "production.yaml")
    assert repository_profile("production").train_image.endswith(DIGEST)


def test_a_platform_on_kubernetes_cannot_name_images_that_would_not_be_used() -> None:
    with pytest.raises(ValueError, match="train_image has no effect with kind: kubernetes"):
        RuntimeConfig.model_validate({"kind": "kubernetes", "train_image": "a:1"})


def without_empty(value: Any) -> Any:
    """Return a document without what is empty or false, which the API server treats as absent."""
    if isinstance(value, dict):
        fields = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in fields.items() if item not in ({}, [], None) and key != "hostNetwork"}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("profile_name", ["gpu", "production"])
def test_the_pods_that_checks_render_without_airflow_are_the_operators(profile_name: str) -> None:
    """The golden files are the operator's; here the memory is that of a first try."""
    from qlora_retrain.runtimes.kubernetes import sample_pods

    profile = repository_profile(profile_name)
    first_tries = {
        kind: getattr(profile, kind).model_copy(update={"max_memory_gib": None}) for kind in ("light", "train", "gpu")
    }
    pods = sample_pods.step_pods(profile.model_copy(update=first_tries), "tickets", RuntimeConfig())
    assert [pod.step for pod in pods] == list(graph.STEPS)
    for pod in pods:
        golden = yaml.safe_load((GOLDEN / profile_name / f"{pod.step.name}.yaml").read_text())
        for document in (golden, pod.manifest):
            document["metadata"].pop("name")
            document["metadata"]["labels"].pop("qlora-retrain.run")
            assert document["spec"]["containers"][0]["args"].pop().endswith("/plan.json")
        assert without_empty(pod.manifest) == without_empty(golden)


def test_the_largest_pod_of_a_step_has_the_memory_that_its_retries_may_reach() -> None:
    from qlora_retrain.runtimes.kubernetes import sample_pods

    profile = repository_profile("gpu")
    memory = {
        pod.step.name: pod.resources["limits"]["memory"]
        for pod in sample_pods.step_pods(profile, "tickets", RuntimeConfig())
    }
    assert memory["train_qlora"] == "128Gi"
    assert memory["validate_data"] == "32Gi"
    above = RuntimeConfig(kind="kubernetes", memory_gib=200)
    assert sample_pods.largest_memory_gib(graph.step("train_qlora"), profile, above) == 200
