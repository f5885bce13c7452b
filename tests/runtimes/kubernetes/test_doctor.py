"""The doctor against an S3 on loopback and a cluster with the production overlay: each misconfiguration is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from qlora_retrain.cli.main import main
from qlora_retrain.config import line
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.runtimes.kubernetes.doctor import doctor
from qlora_retrain.runtimes.kubernetes.findings import Finding, State, exit_code
from tests.manifests.overlays import build_overlay
from tests.runtimes.kubernetes.applied_cluster import applied_cluster
from tests.runtimes.kubernetes.misconfigurations import FURTHER, TEN, Misconfiguration, Scene
from tests.runtimes.kubernetes.spoiled_s3 import spoiled_s3

pytestmark = pytest.mark.timeout(600)
MANIFESTS = project_root() / "manifests"
SECRET = "canary-doctor-8c11"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Start an S3 with one bucket; return its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    account = {"aws_access_key_id": "a", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **account)
    client.create_bucket(Bucket="doctor")
    client.close()
    yield url
    server.stop()


@pytest.fixture
def scene(tmp_path: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A cluster to which the production overlay was applied, an S3, and credentials for both."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "QLORA_RETRAIN_PLATFORM": str(MANIFESTS / "platform.yaml"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for cluster in applied_cluster(tmp_path):
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig))
        for s3 in spoiled_s3(s3_server):
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
            yield Scene.prepare(cluster, s3, tmp_path)


@pytest.fixture
def line_path(tmp_path: Path) -> Path:
    path = tmp_path / "my-line.yaml"
    path.write_text("line: my-line\nsources: {raw_data: 's3://my-data/tickets', base_model: 's3://my-data/base'}\n")
    return path


def examine(scene: Scene, line_path: Path) -> list[Finding]:
    return doctor.examine(scene.profile, "s3://doctor/qlora", [line.load(line_path)])


def faults(findings: list[Finding]) -> dict[str, str]:
    """Return the text of each fault by its check; several of one check are joined."""
    texts: dict[str, str] = {}
    for finding in findings:
        if finding.state is State.FAULT:
            assert finding.remedy, "a fault says what to do"
            texts[finding.check] = f"{texts.get(finding.check, '')} {finding.message}".strip()
    return texts


def unknown(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.state is State.UNKNOWN]


def test_where_all_is_well_nothing_is_a_fault_and_only_the_pool_is_not_known(scene: Scene, line_path: Path) -> None:
    findings = examine(scene, line_path)
    assert faults(findings) == {}
    assert unknown(findings) == ["pool"]
    assert exit_code(findings) == 0
    assert scene.cluster.emulator.created == [], "dry runs alone"


@pytest.mark.parametrize("wrong", [*TEN, *FURTHER], ids=lambda wrong: wrong.name)
def test_a_misconfiguration_is_named(
    wrong: Misconfiguration, scene: Scene, line_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong.spoil(scene)
    monkeypatch.setenv("AWS_ENDPOINT_URL", scene.s3.url)
    findings = examine(scene, line_path)
    texts = faults(findings)
    assert wrong.text in texts[wrong.check]
    assert set(texts) == {wrong.check, *wrong.more_faults}
    assert exit_code(findings) == 12
    # What needs the store, or a write, is not known where that fails.
    needs = {"store": ["write", "conditions"], "write": ["conditions"]}.get(wrong.check, [])
    assert unknown(findings) == [*needs, "pool"]


def test_what_the_doctor_may_not_see_is_not_known_and_no_fault(scene: Scene, line_path: Path) -> None:
    message = 'User "system:serviceaccount:airflow:x" cannot list resource'
    scene.cluster.emulator.rejections = {"GET": (403, message), "POST": (403, message)}
    findings = examine(scene, line_path)
    assert faults(findings) == {}
    remedies = {f.check: f.remedy for f in findings if f.state is State.UNKNOWN}
    assert {"accounts", "roles", "quota", "nodes", "dry run", "network", "storage"} <= set(remedies)
    assert remedies["nodes"] == "kubectl apply -k manifests/doctor"


def test_a_webhook_that_takes_no_dry_runs_is_no_fault(scene: Scene, line_path: Path) -> None:
    message = 'admission webhook "mesh.example" does not support dry run'
    scene.cluster.emulator.rejections = {"POST": (400, message)}
    findings = examine(scene, line_path)
    assert "dry run" in [f.check for f in findings if f.state is State.UNKNOWN and message in f.message]


def test_a_step_that_may_create_pods_is_a_fault(scene: Scene, line_path: Path) -> None:
    binding = scene.cluster.document("RoleBinding", "qlora-retrain-tasks")
    binding["subjects"].append(
        {"kind": "ServiceAccount", "name": "qlora-retrain-evaluate", "namespace": "qlora-retrain"}
    )
    text = faults(examine(scene, line_path))["roles"]
    assert (
        text
        == "account qlora-retrain-evaluate in qlora-retrain: expected that it may not create pods, found that it may"
    )


def test_the_doctor_needs_exactly_what_its_roles_grant(scene: Scene, line_path: Path) -> None:
    examine(scene, line_path)
    documents = list(yaml.safe_load_all((MANIFESTS / "doctor" / "rbac.yaml").read_text()))
    granted = {
        (verb, "/".join(filter(None, (group, resource))))
        for document in documents
        for rule in document.get("rules", ())
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert scene.cluster.emulator.used_verbs == granted


@pytest.fixture
def airflow_api() -> Iterator[tuple[str, dict[str, Any]]]:
    """Serve Airflow's pools on loopback; the test changes what there is."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    pools: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pool = pools.get(self.path.rpartition("/")[2])
            status = 401 if self.headers.get("Authorization") != "Bearer t" else 200 if pool else 404
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(pool or {}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", pools
    server.shutdown()
    thread.join()
    server.server_close()


def test_airflows_pool_is_compared_with_the_quota(
    airflow_api: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_retrain.runtimes.kubernetes.doctor.airflow_pool import check_pool

    url, pools = airflow_api
    (quota,) = [document for document in build_overlay("production") if document["kind"] == "ResourceQuota"]

    def check() -> list[Finding]:
        return list(check_pool("gpu", "nvidia.com/gpu", [quota], url))

    assert [finding.state for finding in check()] == [State.UNKNOWN], "no token"
    monkeypatch.setenv("QLORA_RETRAIN_AIRFLOW_TOKEN", "t")
    assert "pool gpu: expected that it exists, found 404" in check()[0].message
    pools["gpu"] = {"slots": 9, "include_deferred": False}
    assert [finding.message for finding in check()] == [
        "pool gpu: expected include_deferred: true, because a waiting task holds its GPU, found false",
        "pool gpu: expected at most 8 slots, as the quota has GPUs, found 9",
    ]
    pools["gpu"] = {"slots": 8, "include_deferred": True}
    assert check() == []


def test_the_command_prints_a_page_or_json_and_ends_with_the_exit_code(
    scene: Scene, line_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", "--profile", str(scene.profile), "--root", "s3://doctor/qlora", "--line", str(line_path)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    page = capsys.readouterr().out
    assert ended.value.code == 0
    assert "  ok         store " in page
    assert page.endswith("1 not known, 0 fault\n")

    next(wrong for wrong in TEN if wrong.check == "quota").spoil(scene)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == document["exit_code"] == 12
    states = {finding["check"]: finding["state"] for finding in document["findings"]}
    assert states["quota"] == "fault"
    assert states["store"] == "ok"
    for text in (page, json.dumps(document)):
        assert SECRET not in text
        assert "canary" not in text


def test_without_an_api_server_the_store_is_examined_all_the_same(scene: Scene, line_path: Path) -> None:
    document = yaml.safe_load(scene.cluster.kubeconfig.read_text())
    document["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    scene.cluster.kubeconfig.write_text(yaml.safe_dump(document))
    findings = examine(scene, line_path)
    assert set(faults(findings)) == {"cluster"}
    assert [f.check for f in findings if f.state is State.OK] == ["store", "write", "conditions"]
