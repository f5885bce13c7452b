"""The CronJob that mirrors production: the pod that Airflow would start, and a command that is understood."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from qlora_retrain.cli.main import main
from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core.errors import Exit
from qlora_retrain.runtimes.kubernetes import egress, mirror_spec, pod_security
from tests.manifests.overlays import ROOT, documents_of_kind, load_profile


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "mirror" / "cronjob.yaml").read_text())
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def pod(document: dict[str, Any]) -> dict[str, Any]:
    template = document["spec"]["jobTemplate"]["spec"]["template"]
    return {"metadata": template["metadata"], "spec": template["spec"]}


def test_it_is_valid_and_confined(document: dict[str, Any], pod: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, "1.32", strict=True)
    assert pod_security.restricted(pod) == []
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    # Where the root is read-only, every folder that it writes to is a volume.
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    written = {v["name"]: v["value"] for v in container["env"]}
    for name in ("QLORA_RETRAIN_WORK", "QLORA_RETRAIN_CACHE", "TMPDIR"):
        assert any(written[name].startswith(folder) for folder in folders), name


def test_it_is_the_pod_that_airflow_starts(document: dict[str, Any], pod: dict[str, Any]) -> None:
    profile = load_profile("production")
    spec = pod["spec"]
    (container,) = spec["containers"]
    attributes = mirror_spec.pod_attributes("my-line", profile, RuntimeConfig(kind="kubernetes"), "hub-token")
    assert (document["metadata"]["namespace"], spec["serviceAccountName"]) == (
        profile.namespace,
        attributes["service_account_name"],
    )
    accounts = {account["metadata"]["name"] for account in documents_of_kind("production", "ServiceAccount")}
    assert spec["serviceAccountName"] in accounts
    names = {variable.name for variable in attributes["env_vars"]} - {"QLORA_RETRAIN_IMAGE"}
    assert {variable["name"] for variable in container["env"]} == names | {"QLORA_RETRAIN_ROOT"}
    secrets = {volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume}
    assert secrets == {"hub-token"}
    assert container["image"].partition("@")[0].partition(":")[0] == profile.light_image.partition(":")[0]


def test_the_policies_of_mirrors_and_of_all_pods_select_it(pod: dict[str, Any]) -> None:
    everywhere = {"name": "x", "blocks": ["192.0.2.1/32"]}
    profile = ClusterProfile.model_validate({"egress": [everywhere], "mirror_egress": [everywhere]})
    policies = egress.network_policies(profile)
    assert len(policies) == 2
    for policy in policies:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_its_command_is_understood_and_the_job_fails_where_another_try_is_of_no_use(
    document: dict[str, Any], pod: dict[str, Any], root_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    arguments = pod["spec"]["containers"][0]["args"]
    assert arguments[:3] == ["python", "-m", "qlora_retrain.cli"]
    with pytest.raises(SystemExit) as ended:
        main(arguments[3:])
    code = ended.value.code
    assert "my-line" in capsys.readouterr().err
    (rule,) = document["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert code == Exit.USAGE
    assert code not in rule["onExitCodes"]["values"]
    assert rule["onExitCodes"] | {"values": []} == {"containerName": "mirror", "operator": "NotIn", "values": []}
    assert Exit.TRY_AGAIN in rule["onExitCodes"]["values"]
