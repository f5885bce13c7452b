"""`deploy-check`: the repository's three overlays keep its rules, and each kind of fault is named with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.cli.main import main
from qlora_retrain.config import line
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.kubernetes.deploy import by_hand, check
from qlora_retrain.runtimes.kubernetes.deploy.overlay import Overlay
from qlora_retrain.runtimes.kubernetes.findings import Finding, State
from tests.manifests.overlays import ROOT, build_overlay

Document = dict[str, Any]
DIGEST = "@sha256:" + "7" * 64
LINE = "line: my-line\nsources: {raw_data: 's3://my-data/tickets', base_model: 's3://my-data/base'}\n"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., check.Report]:
    """Check an overlay as it is built in the repository, with changes of its documents and of its profile."""
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(ROOT / "platform.yaml"))

    def make(
        overlay: str,
        spoil: Callable[[list[Document]], object] = len,
        lines: str = "",
        kubernetes: str = "",
        **changes: object,
    ) -> check.Report:
        name = "production" if overlay == "production" else "gpu"
        document = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
        if name == "production":
            document |= {key: document[key].rpartition(":")[0] + DIGEST for key in ("light_image", "train_image")}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**document, **changes}))

        # The documents of one build, because kustomize would build the same again.
        documents = json.loads(json.dumps(build_overlay(overlay)))
        spoil(documents)
        built = Overlay(ROOT / "overlays" / overlay, tuple(documents))
        monkeypatch.setattr(check.overlay, "build", lambda folder: built)
        (tmp_path / "line.yaml").write_text(lines)
        options = {"kubernetes": kubernetes} if kubernetes else {}
        configs = [line.load(tmp_path / "line.yaml")] if lines else []
        return check.check(path, built.folder, configs, **options)

    return make


def faults(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state is State.FAULT]


def document_of(documents: list[Document], kind: str, name: str = "") -> Document:
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"].startswith(name))


@pytest.mark.parametrize("overlay", ["gpu", "production", "kfp"])
def test_the_overlays_of_the_repository_keep_every_rule(overlay: str, report: Callable[..., check.Report]) -> None:
    result = report(overlay)
    assert faults(result.findings) == []
    assert {finding.check for finding in result.findings} == {name for name, _, _ in check._RULES}
    assert any("192.0.2.10/32" in step for step in result.by_hand), "a placeholder is left to do"


def without(kind: str, name: str) -> Callable[[list[Document]], object]:
    return lambda documents: documents.remove(document_of(documents, kind, name))


def spoil_schema(documents: list[Document]) -> None:
    document_of(documents, "ResourceQuota")["spec"]["hrad"] = {}


def spoil_security(documents: list[Document]) -> None:
    document_of(documents, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce")


def spoil_quota(documents: list[Document]) -> None:
    document_of(documents, "ResourceQuota")["spec"]["hard"]["requests.memory"] = "100Gi"


def spoil_full_pool(documents: list[Document]) -> None:
    document_of(documents, "ResourceQuota")["spec"]["hard"]["limits.memory"] = "1000Gi"


def spoil_limits(documents: list[Document]) -> None:
    document_of(documents, "LimitRange")["spec"]["limits"][0]["max"]["memory"] = "48Gi"


def spoil_role(documents: list[Document]) -> None:
    document_of(documents, "Role", "qlora-retrain-tasks")["rules"][0]["verbs"].remove("patch")


def spoil_triggerer(documents: list[Document]) -> None:
    document_of(documents, "Role", "qlora-retrain-triggerer")["rules"][0]["verbs"].append("create")


def spoil_egress(documents: list[Document]) -> None:
    document_of(documents, "NetworkPolicy", "egress-store")["spec"]["egress"][0]["to"][0]["ipBlock"]["cidr"] = (
        "10.0.0.0/8"
    )


def spoil_token(documents: list[Document]) -> None:
    document_of(documents, "ServiceAccount", "qlora-retrain-evaluate")["automountServiceAccountToken"] = True


@pytest.mark.parametrize(
    ("spoil", "name", "text"),
    [
        (spoil_schema, "schemas", "ResourceQuota qlora-retrain, spec: expected what Kubernetes 1.32 takes"),
        (spoil_security, "pod security", "enforce: expected restricted, found no label"),
        (without("ValidatingAdmissionPolicyBinding", ""), "images", "expected a ValidatingAdmissionPolicy for digests"),
        (spoil_quota, "quota", "requests.memory: expected at least 128Gi, as the largest pod of train_qlora"),
        (spoil_full_pool, "quota", "limits.memory: expected at least 1088Gi for 8 pods of"),
        (spoil_limits, "quota", "LimitRange, memory: expected a maximum of at least 128Gi"),
        (without("ServiceAccount", "qlora-retrain-evaluate"), "accounts", "expected the account of the pod of"),
        (spoil_token, "accounts", "automountServiceAccountToken: expected false, found true"),
        (without("Role", "qlora-retrain-triggerer"), "roles", "RoleBinding qlora-retrain-triggerer: expected Role"),
        (spoil_role, "roles", "Airflow's tasks (airflow-scheduler): expected to be allowed: create pods"),
        (spoil_triggerer, "roles", "Airflow's triggerer (airflow-triggerer): expected no further permission"),
        (without("PriorityClass", ""), "objects", "PriorityClass, as priority_class says: expected qlora-retrain"),
        (without("PersistentVolumeClaim", ""), "objects", "as cache_claim says: expected qlora-retrain-cache"),
        (spoil_egress, "network", "NetworkPolicy egress-store: expected what"),
        (without("NetworkPolicy", "egress-kms"), "network", "NetworkPolicy egress-kms: expected the destination of"),
        (without("NetworkPolicy", "default-deny"), "network", "a NetworkPolicy that closes Ingress and Egress"),
    ],
)  # fmt: skip
def test_a_fault_of_an_overlay_is_named(
    spoil: Callable[[list[Document]], object], name: str, text: str, report: Callable[..., check.Report]
) -> None:
    named = faults(report("production", spoil).findings)
    assert {fault.check for fault in named} == {name}
    assert any(text in fault.message for fault in named), [fault.message for fault in named]
    assert all(fault.remedy for fault in named)


def spoil_kubeflows_token(documents: list[Document]) -> None:
    document_of(documents, "ServiceAccount")["automountServiceAccountToken"] = False


@pytest.mark.parametrize(
    ("spoil", "name", "text"),
    [
        (spoil_kubeflows_token, "accounts", "expected true, found false"),
        (spoil_security, "pod security", "enforce: expected baseline, found no label"),
        (without("Role", "qlora-retrain-kfp"), "roles", "expected Role qlora-retrain-kfp"),
        (spoil_limits, "quota", "LimitRange, memory: expected a maximum of at least 128Gi"),
    ],
)
def test_a_fault_of_kubeflows_overlay_is_named(
    spoil: Callable[[list[Document]], object], name: str, text: str, report: Callable[..., check.Report]
) -> None:
    named = faults(report("kfp", spoil).findings)
    assert {fault.check for fault in named} == {name}
    assert any(text in fault.message for fault in named)


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        (
            {"train_image": "registry.example/train:1"},
            "images",
            "expected name@sha256:<64 hex>, found registry.example",
        ),
        ({"gpu": {"memory_gib": 64}}, "nodes", "gpu: expected node_selector or tolerations, found neither"),
        ({"light": {"memory_gib": 8}}, "quota", ""),
        ({"egress": []}, "network", "egress: expected at least the store, found nothing"),
        (
            {"namespace": "elsewhere"},
            "objects",
            "Namespace, as namespace says: expected elsewhere, found qlora-retrain",
        ),
        ({"cache_claim": "another"}, "objects", "expected another, found qlora-retrain-cache"),
    ],
)
def test_a_fault_of_a_profile_is_named(
    changes: dict[str, object], name: str, text: str, report: Callable[..., check.Report]
) -> None:
    messages = [fault.message for fault in faults(report("production", **changes).findings) if fault.check == name]
    # A pod that states no cores gets the LimitRange's default, so it still fits.
    assert any(text in message for message in messages) if text else messages == []


def test_a_quota_of_cores_needs_pods_that_state_them(report: Callable[..., check.Report]) -> None:
    def spoil(documents: list[Document]) -> None:
        documents.remove(document_of(documents, "LimitRange"))

    messages = [f.message for f in faults(report("production", spoil, light={"memory_gib": 8}).findings)]
    assert (
        "ResourceQuota qlora-retrain, requests.cpu: expected that the pod of validate_data states it, found none"
        in (messages)
    )


def test_a_line_must_fit_the_profile(report: Callable[..., check.Report]) -> None:
    messages = [f.message for f in faults(report("production", lines=LINE).findings)]
    assert messages == [
        "line my-line, train.device: expected cuda, found auto",
        "line my-line, evaluate.device: expected cuda, found auto",
    ]
    ready = f"{LINE}train: {{device: cuda, num_processes: 2}}\nevaluate: {{device: cuda}}\n"
    assert [f.message for f in faults(report("production", lines=ready).findings)] == [
        "line my-line, train.num_processes: expected 1, the profile's train_gpus, found 2"
    ]


def test_what_is_left_to_do_names_this_deployments_own(report: Callable[..., check.Report]) -> None:
    steps = "\n".join(report("production", key_secrets="qlora-retrain-keys", local_queue="team-a", lines=LINE).by_hand)
    for text in (
        "overlays/production/volumes.yaml: replace the placeholder fs-00000000000000000 with the file system",
        "airflow/values.yaml: replace the placeholder git.example/qlora-retrain.git",
        f"push the image registry.example/qlora-retrain-light{DIGEST}",
        "for the account qlora-retrain-publish-my-line",
        "create the secret qlora-retrain-keys-planner in the namespace qlora-retrain",
        "create the secret qlora-retrain-keys-publish-my-line",
        "GPU steps: labels kubernetes.io/arch=amd64, nvidia.com/gpu.present=true; tolerated taints: nvidia",
        "enforces NetworkPolicies",
        "driver ebs.csi.aws.com",
        "airflow pools set --include-deferred gpu 8",
        "LocalQueue team-a",
    ):
        assert text in steps, text
    assert "create the secret qlora-retrain-store in the namespace qlora-retrain-kfp" in report("kfp").by_hand


def test_a_placeholder_that_was_replaced_is_done() -> None:
    texts = ["registry.example/train", "192.0.2.10/32", "111122223333", "s3://my-bucket/qlora"]
    assert all(any(pattern.search(text) for pattern in by_hand._PLACEHOLDERS) for text in texts)
    own = ["registry.acme.com/train", "10.0.2.10/32", "444455556666", "s3://acme/qlora", "fs-0123456789abcdef0"]
    assert not any(pattern.search(text) for text in own for pattern in by_hand._PLACEHOLDERS)


def test_an_older_clusters_schemas_can_be_named_and_json_has_a_document_for_each_overlay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy-check", "--profile", str(ROOT / "profiles" / "gpu.yaml"), "--kubernetes", "1.30", "--json"])
    assert ended.value.code == 0
    titles = [document["title"].rpartition("/")[2] for document in json.loads(capsys.readouterr().out)]
    assert titles == ["gpu", "kfp"], "Kubeflow's egress was rendered from this profile"


def test_the_command_checks_the_overlays_of_a_profile_and_ends_with_12_while_images_are_tags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy-check", "--profile", str(ROOT / "profiles" / "production.yaml")])
    page = capsys.readouterr().out
    assert ended.value.code == 12
    assert page.count("FAULT") == 2
    assert "found registry.example/qlora-retrain-train:0.1.0\n" in page
    assert "do: push the image and write the digest" in page
    assert "Still to do by hand:\n  - " in page


def test_a_version_without_schemas_is_a_usage_error(report: Callable[..., check.Report]) -> None:
    for version in ("1.99", "1.2", "newest"):
        with pytest.raises(UsageError, match=r"--kubernetes .*: expected one of .*1\.30, 1\.31"):
            report("gpu", kubernetes=version)


def test_an_overlay_that_kustomize_cannot_build_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy-check", "--profile", str(ROOT / "profiles" / "gpu.yaml"), "--overlay", str(tmp_path)])
    assert ended.value.code == 12
    assert "kustomize cannot build it" in capsys.readouterr().err
