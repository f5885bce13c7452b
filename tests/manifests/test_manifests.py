"""The manifests: built by kustomize, valid, with no unneeded permission, and with the names that the profiles use."""

from __future__ import annotations

import itertools
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity
from pydantic import ValidationError

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from tests.manifests.overlays import (
    OVERLAYS,
    PROFILES,
    ROOT,
    allows_address,
    apply_limit_range,
    build_overlay,
    documents_of_kind,
    granted_permissions,
    load_profile,
    names_of_kind,
    token_by_account,
)

SECRETS_MADE_BY_HAND = {"qlora-retrain-store"}  # a secret: never in a repository; docs/deploy.md makes it
Document = dict[str, Any]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_document_is_valid_and_none_holds_a_secret(overlay: str) -> None:
    for document in build_overlay(overlay):
        kubernetes_validate.validate(document, "1.32", strict=True)
        assert document["kind"] not in ("Secret", "ClusterRole", "ClusterRoleBinding", "Pod", "Deployment")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_role_has_a_wildcard_and_none_is_the_default_accounts(overlay: str) -> None:
    for role in documents_of_kind(overlay, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "deletecollection" not in rule["verbs"]
    assert "default" not in {name for _, name in granted_permissions(overlay)}


@pytest.mark.parametrize("overlay", PROFILES)
def test_a_step_under_airflow_has_no_token_and_airflow_no_more_than_pods_and_what_is_said_of_them(overlay: str) -> None:
    assert set(token_by_account(overlay).values()) == {False}
    granted = granted_permissions(overlay)
    assert set(granted) == {("airflow", "airflow-scheduler"), ("airflow", "airflow-triggerer")}, (
        "no account of ours may do anything"
    )
    for permissions in granted.values():
        assert {resource for _, resource, _ in permissions} == {"pods", "pods/log", "events"}, "no secrets, no exec"
    creators = {name for (_, name), permissions in granted.items() if ("create", "pods", "any") in permissions}
    assert creators == {"airflow-scheduler"}


@pytest.mark.parametrize("overlay", ["gpu", "production"])
def test_the_namespace_takes_restricted_pods_alone(overlay: str) -> None:
    (namespace,) = documents_of_kind(overlay, "Namespace")
    labels = namespace["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_upgrade_of_the_cluster_does_not_change_which_pods_the_namespace_takes(overlay: str) -> None:
    (namespace,) = documents_of_kind(overlay, "Namespace")
    labels = namespace["metadata"]["labels"]
    versions = {labels[f"pod-security.kubernetes.io/{mode}-version"] for mode in ("enforce", "audit", "warn")}
    assert versions == {"v1.30"}, "docs/deploy.md: the oldest Kubernetes that it is for"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_that_is_applied_again_changes_nothing(overlay: str) -> None:
    """The API server drops a false `globalDefault` and adds a rule's `scope`: kubectl would see a change each time."""
    for priority in documents_of_kind(overlay, "PriorityClass"):
        assert priority.get("globalDefault") is not False
    for policy in documents_of_kind(overlay, "ValidatingAdmissionPolicy"):
        for rule in policy["spec"]["matchConstraints"]["resourceRules"]:
            assert rule["scope"] == "*"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_goes_in_and_nothing_out_but_to_dns_and_what_the_profile_lists(overlay: str) -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in documents_of_kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert not any("ingress" in spec for spec in policies.values())
    assert all(rule.get("to") for spec in policies.values() for rule in spec.get("egress", ())), "an open door"
    destinations = {f"egress-{d.name}" for d in load_profile("production" if overlay == "production" else "gpu").egress}
    assert destinations >= {"production": {"egress-store", "egress-sts", "egress-kms"}}.get(overlay, {"egress-store"})
    assert set(policies) - {"default-deny", "names"} - destinations == (
        {"kfp", "api-server"} if overlay == "kfp" else set()
    )

    # A placeholder of the profile's, and nothing beside it.
    peers = [peer for name in destinations for rule in policies[name]["egress"] for peer in rule["to"]]
    assert any(allows_address(peer, "192.0.2.10") for peer in peers)
    elsewhere = ("52.218.0.1", "8.8.8.8", "192.0.2.99", "169.254.169.254", "10.100.0.1", "172.20.0.1", "192.168.1.1")
    assert not any(allows_address(peer, address) for peer in peers for address in elsewhere)
    ports = [port for name in destinations for rule in policies[name]["egress"] for port in rule["ports"]]
    assert {(port["protocol"], port["port"]) for port in ports} == {("TCP", 443)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlays_egress_is_what_its_profile_renders(overlay: str) -> None:
    from qlora_retrain.runtimes.kubernetes import egress

    profile = "production" if overlay == "production" else "gpu"
    text = (ROOT / "overlays" / overlay / "egress.yaml").read_text()
    assert list(yaml.safe_load_all(text)) == egress.network_policies(load_profile(profile))
    assert text.startswith(f"# qlora-retrain egress manifests/profiles/{profile}.yaml\n")


def test_trackers_and_a_proxy_are_opened_by_the_profile_alone() -> None:
    from qlora_retrain.runtimes.kubernetes import egress

    profile = ClusterProfile.model_validate(
        {
            "egress": [
                {"name": "mlflow", "blocks": ["10.1.2.0/24", "2001:db8::/64"], "ports": [5000]},
                {"name": "hub", "namespace": "proxy", "pods": {"app": "squid"}, "ports": [3128]},
            ]
        }
    )
    tracker, hub = egress.network_policies(profile)
    for document in (tracker, hub):
        kubernetes_validate.validate(document, "1.32", strict=True)
    (rule,) = tracker["spec"]["egress"]
    assert [allows_address(peer, "10.1.2.9") for peer in rule["to"]] == [True, False]
    assert rule["ports"] == [{"protocol": "TCP", "port": 5000}]
    (rule,) = hub["spec"]["egress"]
    assert rule["to"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "proxy"}},
            "podSelector": {"matchLabels": {"app": "squid"}},
        }
    ]


@pytest.mark.parametrize(
    "destination",
    [
        {"blocks": ["0.0.0.0/0"]},
        {"blocks": ["::/0"]},
        {"blocks": ["169.254.169.254/32"]},
        {"blocks": ["168.0.0.0/7"]},
        {"blocks": ["fd00:ec2::254/128"]},
        {"blocks": ["s3.amazonaws.com"]},
        {"blocks": ["10.0.0.0/8"], "namespace": "proxy"},
        {"pods": {"app": "squid"}},
        {},
    ],
)
def test_a_profile_cannot_open_the_world_or_a_nodes_metadata(destination: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClusterProfile.model_validate({"egress": [{"name": "store", **destination}]})


@pytest.mark.parametrize("overlay", ["gpu", "production"])
def test_the_policies_speak_of_the_labels_that_pods_have(overlay: str) -> None:
    from qlora_retrain.runtimes.kubernetes import pod_spec

    for policy in documents_of_kind(overlay, "NetworkPolicy"):
        assert policy["spec"]["podSelector"].get("matchLabels", pod_spec.LABELS) == pod_spec.LABELS


@pytest.mark.parametrize("name", PROFILES)
def test_what_a_profile_names_exists_and_what_exists_is_named(name: str) -> None:
    from qlora_retrain.runtimes.kubernetes import pod_spec

    cluster = load_profile(name)
    assert names_of_kind(name, "Namespace") == {cluster.namespace}
    assert {d["metadata"]["namespace"] for d in build_overlay(name) if "namespace" in d["metadata"]} == {
        cluster.namespace
    }
    assert names_of_kind(name, "ServiceAccount") == pod_spec.service_account_names(cluster, "my-line")
    assert names_of_kind(name, "PriorityClass") == {cluster.priority_class}

    claims = documents_of_kind(name, "PersistentVolumeClaim")
    assert {c["metadata"]["name"] for c in claims} == ({cluster.cache_claim} - {None})
    classes = {cluster.storage_class, *(c["spec"]["storageClassName"] for c in claims)}
    assert names_of_kind(name, "StorageClass") == classes - {None}
    assert {secret.name for secret in cluster.secrets} <= SECRETS_MADE_BY_HAND


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_and_airflows_values_name_a_region_that_boto3_reads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3.session

    for variable in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    values = yaml.safe_load((ROOT / "airflow" / "values.yaml").read_text())
    for environment in (load_profile(name).env, {variable["name"]: variable["value"] for variable in values["env"]}):
        with monkeypatch.context() as patch:
            for variable, text in environment.items():
                if variable.startswith("AWS_"):
                    patch.setenv(variable, text)
            assert boto3.session.Session().region_name == "eu-west-1"


@pytest.mark.parametrize("name", PROFILES)
def test_pods_give_way_to_services_and_still_get_nodes_made_for_them(name: str) -> None:
    (priority,) = documents_of_kind(name, "PriorityClass")
    assert -10 <= priority["value"] < 0, "below -10 Cluster Autoscaler makes no node"
    assert priority["preemptionPolicy"] == "Never"
    assert "globalDefault" not in priority


def counted_resources(name: str, step: graph.Step, memory_gib: float | None = None) -> dict[str, Decimal]:
    """Return what a step's pod counts against a quota, by the quota's names for it, once it is admitted."""
    from kubernetes.client import ApiClient

    from qlora_retrain.runtimes.kubernetes import pod_spec

    requirements = pod_spec.resource_requirements(
        step, load_profile(name), RuntimeConfig(kind="kubernetes"), memory_gib
    )
    admitted = apply_limit_range(name, ApiClient().sanitize_for_serialization(requirements))
    return {
        f"{side}.{resource}": parse_quantity(admitted[side][resource])
        for side in admitted
        for resource in admitted[side]
    }


@pytest.mark.parametrize("name", PROFILES)
def test_every_pod_of_a_profile_fits_its_quota_and_its_limits(name: str) -> None:
    cluster = load_profile(name)
    (quota,) = documents_of_kind(name, "ResourceQuota")
    hard = {resource: parse_quantity(quantity) for resource, quantity in quota["spec"]["hard"].items()}
    (limits,) = documents_of_kind(name, "LimitRange")
    container_max = {
        f"limits.{resource}": parse_quantity(q) for resource, q in limits["spec"]["limits"][0]["max"].items()
    }
    assert {"limits.memory", "requests.memory", "requests.cpu", "requests.ephemeral-storage"} <= set(hard)
    for step in graph.STEPS:
        for memory_gib in (None, cluster.pod(step).max_memory_gib):
            counted = counted_resources(name, step, memory_gib)
            assert [
                resource
                for bound in (hard, container_max)
                for resource in bound
                if counted.get(resource, 0) > bound[resource]
            ] == []

    # A full pool has as many tasks as GPUs. Each may have grown to its maximum, and steps without a GPU run beside it.
    pool_tasks = int(hard[f"requests.{cluster.gpu_resource}"])
    for gpus, neighbour in itertools.product(graph.STEPS, graph.STEPS):
        if cluster.gpus(gpus) and not cluster.gpus(neighbour):
            pool, beside = (
                counted_resources(name, step, cluster.pod(step).max_memory_gib) for step in (gpus, neighbour)
            )
            crowded = [
                resource
                for resource in hard
                if pool_tasks * pool.get(resource, 0) + beside.get(resource, 0) > hard[resource]
            ]
            assert crowded == [], f"no room for {neighbour.name} beside a full pool of {gpus.name}"
    disk = hard["requests.storage" if cluster.storage_class else "requests.ephemeral-storage"]
    assert cluster.disk_gib * 2 * 2**30 <= disk, "two steps run beside each other"


@pytest.mark.parametrize("name", PROFILES)
def test_a_pod_asks_for_what_its_spec_shows_and_a_volume_of_its_own_spares_the_nodes_disk(name: str) -> None:
    from kubernetes.client import ApiClient

    from qlora_retrain.runtimes.kubernetes import pod_spec

    cluster = load_profile(name)
    for step in graph.STEPS:
        requirements = ApiClient().sanitize_for_serialization(
            pod_spec.resource_requirements(step, cluster, RuntimeConfig(kind="kubernetes"))
        )
        assert apply_limit_range(name, requirements) == {
            "limits": requirements["limits"],
            "requests": {**requirements["limits"], **requirements["requests"]},
        }
        if cluster.storage_class:
            counted = counted_resources(name, step)["requests.ephemeral-storage"]
            assert counted <= 4 * 2**30, "a root disk of 20 GiB, of which images take most"


def test_production_refuses_an_image_without_a_digest_whichever_way_it_comes_into_a_pod() -> None:
    import cel

    (policy,) = documents_of_kind("production", "ValidatingAdmissionPolicy")

    def is_admitted(**containers: str) -> bool:
        pod = {"spec": {kind: [{"name": "c", "image": image}] for kind, image in containers.items()}}
        variables = {v["name"]: cel.evaluate(v["expression"], {"object": pod}) for v in policy["spec"]["variables"]}
        (rule,) = policy["spec"]["validations"]
        return cel.evaluate(rule["expression"], {"object": pod, "variables": variables}) is True

    pinned = "registry.example:5000/qlora-retrain-train@sha256:" + "7" * 64
    assert is_admitted(containers=pinned)
    assert is_admitted(containers=pinned, initContainers=pinned, ephemeralContainers=pinned)
    for image in ("train", "registry.example/train:0.1.0", pinned[:-1], pinned + "0", pinned.replace("sha256:", "")):
        assert not is_admitted(containers=image)
        assert not is_admitted(containers=pinned, initContainers=image)
        assert not is_admitted(containers=pinned, ephemeralContainers=image)


def test_the_rule_of_digests_is_asked_for_every_pod_of_production_and_for_what_comes_into_one_later() -> None:
    (policy,) = documents_of_kind("production", "ValidatingAdmissionPolicy")
    (binding,) = documents_of_kind("production", "ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    assert binding["spec"]["validationActions"] == ["Deny"]
    selected = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
    assert selected == {"kubernetes.io/metadata.name": load_profile("production").namespace}
    assert policy["spec"]["failurePolicy"] == "Fail"
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert set(rule["resources"]) == {"pods", "pods/ephemeralcontainers"}
    assert set(rule["operations"]) == {"CREATE", "UPDATE"}


def test_every_step_of_production_and_its_mirrors_have_an_account_and_a_role_of_their_own() -> None:
    roles = {
        account["metadata"]["name"]: account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        for account in documents_of_kind("production", "ServiceAccount")
    }
    assert len(set(roles.values())) == len(roles) == len(graph.STEPS) + 1


def test_airflow_finds_the_dags_the_profile_and_a_pool_that_counts_what_waits() -> None:
    values = yaml.safe_load((ROOT / "airflow" / "values.yaml").read_text())
    environment = {variable["name"]: variable["value"] for variable in values["env"]}
    checkout = Path("/opt/airflow/dags/repo")
    assert (ROOT.parent / values["dags"]["gitSync"]["subPath"] / "retrain.py").is_file()
    assert (ROOT.parent / Path(environment["QLORA_RETRAIN_PROFILE"]).relative_to(checkout)).is_file()
    assert (ROOT.parent / Path(environment["PYTHONPATH"]).relative_to(checkout) / "qlora_retrain").is_dir()

    command = values["migrateDatabaseJob"]["args"][-1]
    for name in PROFILES:
        (quota,) = documents_of_kind(name, "ResourceQuota")
        gpus = quota["spec"]["hard"]["requests.nvidia.com/gpu"]
        assert f"airflow pools set --include-deferred {load_profile(name).gpu_pool} {gpus} " in command
        subjects = {(s["namespace"], s["name"]) for b in documents_of_kind(name, "RoleBinding") for s in b["subjects"]}
        assert subjects == {("airflow", "airflow-scheduler"), ("airflow", "airflow-triggerer")}


def test_the_fault_drill_names_tests_that_exist() -> None:
    page = (ROOT.parent / "docs" / "fault-drill.md").read_text()
    files = {ROOT.parent / name for name in re.findall(r"`(tests/[\w/]+\.py)`", page)}
    assert len(files) == 13
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 10
    assert named <= defined


def test_the_page_on_deploying_names_files_overlays_and_names_that_exist() -> None:
    page = (ROOT.parent / "docs" / "deploy.md").read_text()
    files = set(re.findall(r"(?:manifests|tests|docs)/[\w./-]*\w", page))
    assert len(files) > 10
    assert [name for name in files if not (ROOT.parent / name).exists()] == []
    assert set(re.findall(r"apply -k manifests/overlays/(\w+)", page)) | {"gpu"} == set(OVERLAYS)
    # A role's keys are in a secret that is named after the role.
    keys = {"qlora-retrain-keys-${role//_/-}", "qlora-retrain-keys-planner"}
    assert set(re.findall(r"create secret generic (\S+)", page)) == SECRETS_MADE_BY_HAND | keys
    profile = ClusterProfile(key_secrets=re.findall(r"key_secrets: ([\w-]+)`", page)[0])
    assert profile.key_secret("planner") == "qlora-retrain-keys-planner"
    assert set(re.findall(r" -n ([\w-]+)", page)) == {"airflow", *(load_profile(name).namespace for name in PROFILES)}
    for values in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        assert isinstance(yaml.safe_load(values), dict)
