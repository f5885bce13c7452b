"""The namespace of Kubeflow's runs: one account with a token, its permissions, and what its pods may connect to.

What KFP's pods need was read from the sources of KFP and Argo, of releases whose drivers are pods. A real cluster has
taken these manifests; KFP's controllers have not run with them.
"""

from __future__ import annotations

from tests.manifests.overlays import (
    Document,
    allows_address,
    apply_limit_range,
    documents_of_kind,
    granted_permissions,
    load_profile,
    names_of_kind,
    token_by_account,
)

NAMESPACE = "qlora-retrain-kfp"
RUN = {"matchExpressions": [{"key": "workflows.argoproj.io/workflow", "operator": "Exists"}]}  # every pod of a run


def egress(name: str) -> list[Document]:
    (policy,) = [p for p in documents_of_kind("kfp", "NetworkPolicy") if p["metadata"]["name"] == name]
    assert policy["spec"]["podSelector"] == RUN
    assert policy["spec"]["policyTypes"] == ["Egress"]
    rules: list[Document] = policy["spec"]["egress"]
    return rules


def test_the_account_of_a_run_has_a_token_and_no_other_account_is_there() -> None:
    assert names_of_kind("kfp", "Namespace") == {NAMESPACE}
    assert token_by_account("kfp") == {load_profile("gpu").service_account: True}


def test_a_run_may_report_its_steps_and_read_where_its_artifacts_go_and_nothing_else() -> None:
    account = (NAMESPACE, load_profile("gpu").service_account)
    assert granted_permissions("kfp") == {
        account: {
            ("create", "argoproj.io/workflowtaskresults", "any"),  # Argo's executor
            ("patch", "argoproj.io/workflowtaskresults", "any"),
            ("get", "configmaps", "kfp-launcher"),  # KFP's driver
            ("get", "secrets", "mlpipeline-minio-artifact"),  # KFP's launcher
        }
    }


def test_a_step_may_fill_its_work_folder_though_kubeflow_cannot_request_the_nodes_disk() -> None:
    """The folder counts against a container's limit of the node's disk, so there is none; the quota needs a request."""
    resources = apply_limit_range("kfp", {"limits": {"memory": "64Gi"}})
    assert "ephemeral-storage" not in resources["limits"]
    assert "ephemeral-storage" in resources["requests"]


def test_the_containers_that_argo_and_kubeflow_add_request_little() -> None:
    resources = apply_limit_range("kfp", {})
    assert {name: resources["requests"][name] for name in ("cpu", "memory")} == {"cpu": "100m", "memory": "256Mi"}
    assert resources["limits"] == {"memory": "2Gi"}


def test_a_run_reaches_kubeflows_own_services_by_name_and_port() -> None:
    services = set()
    for rule in egress("kfp"):
        (peer,), (port,) = rule["to"], rule["ports"]
        assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}
        ((label, value),) = peer["podSelector"]["matchLabels"].items()
        services.add((label, value, port["protocol"], port["port"]))
    assert services == {
        ("app", "ml-pipeline", "TCP", 8887),
        ("component", "metadata-grpc-server", "TCP", 8080),
        ("app", "minio", "TCP", 9000),
        ("app", "seaweedfs", "TCP", 8333),  # behind the service's 9000
    }


def test_a_run_reaches_the_api_server_and_no_address_beside_it() -> None:
    (rule,) = egress("api-server")
    assert all(peer["ipBlock"]["cidr"].endswith("/32") for peer in rule["to"])
    assert any(allows_address(peer, "192.0.2.1") for peer in rule["to"]), (
        "a placeholder: it is somebody's own in a cluster"
    )
    assert {(port["protocol"], port["port"]) for port in rule["ports"]} == {("TCP", 443), ("TCP", 6443)}


def test_names_and_the_store_are_for_the_pods_of_runs() -> None:
    assert egress("names")
    assert egress("egress-store")
