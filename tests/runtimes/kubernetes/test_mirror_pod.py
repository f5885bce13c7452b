"""A mirror's pod: an account, a token and a way out of its own, and no key that signs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.cluster_profile import load as load_profile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.runtimes.kubernetes import egress
from qlora_retrain.runtimes.kubernetes.pod_spec import CONTAINER_SECURITY_CONTEXT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
RUN = "20260131T030000Z-0123456789ab"
ARGUMENTS = ["mirror", "tickets", "production", "--to=hf://owner/model"]


def pod_of(destination: str = "hf://owner/model", **changes: object) -> Any:
    from qlora_retrain.runtimes.airflow.mirror_pod import KubernetesMirror

    profile = load_profile(project_root() / "manifests" / "profiles" / "gpu.yaml")
    document = {**profile.model_dump(exclude_unset=True), "service_account": "qlora-retrain", **changes}
    command = KubernetesMirror(
        secret="hub-token",
        destination=destination,
        task_id="mirror",
        step="publish",
        line="tickets",
        runtime=RuntimeConfig(),
        profile=ClusterProfile.model_validate(document),
    )
    command.prepare_command(ARGUMENTS, RUN, timedelta(hours=4))
    return command.pod_request_obj


def test_the_pod_has_its_own_account_token_and_label_and_no_key_of_publish() -> None:
    pod = pod_of(account_per_step=True, key_secrets="keys")
    (container,) = pod.spec.containers
    assert pod.spec.service_account_name == "qlora-retrain-mirror"
    assert not pod.spec.automount_service_account_token
    assert container.args == ["python", "-m", "qlora_retrain.cli", *ARGUMENTS]
    assert pod.metadata.labels["qlora-retrain.step"] == "mirror"
    secrets = {volume.name: volume.secret.secret_name for volume in pod.spec.volumes if volume.secret}
    mounts = {mount.mount_path: mount for mount in container.volume_mounts if mount.name in secrets}
    by_folder = {folder: secrets[mount.name] for folder, mount in mounts.items() if mount.name.startswith("mirror")}
    assert by_folder == {"/run/secrets/mirror": "hub-token", "/run/secrets/keys": "keys-mirror"}
    assert all(mount.read_only for mount in mounts.values())
    variables = {variable.name: variable.value for variable in container.env}
    assert variables["QLORA_RETRAIN_MIRROR_SECRET"] == "/run/secrets/mirror"
    assert variables["QLORA_RETRAIN_KEYS"] == "/run/secrets/keys"
    assert container.security_context == CONTAINER_SECURITY_CONTEXT
    assert pod.spec.active_deadline_seconds == 4 * 3600


def test_each_mirror_of_a_run_has_a_pod_and_the_profile_names_the_account() -> None:
    pod, other_pod = pod_of(), pod_of("mlflow", mirror_service_account="to-the-world")
    assert pod.metadata.name != other_pod.metadata.name
    assert max(len(pod.metadata.name), len(other_pod.metadata.name)) <= 63
    assert pod.spec.service_account_name == "qlora-retrain"
    assert other_pod.spec.service_account_name == "to-the-world"


def test_the_way_to_a_mirror_is_open_to_its_pods_alone() -> None:
    profile = ClusterProfile.model_validate(
        {
            "egress": [{"name": "store", "blocks": ["10.0.0.1/32"]}],
            "mirror_egress": [{"name": "proxy", "namespace": "proxies", "ports": [3128]}],
        }
    )
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in egress.network_policies(profile)}
    assert set(policies) == {"egress-store", "mirror-to-proxy"}
    selectors = {name: spec["podSelector"]["matchLabels"] for name, spec in policies.items()}
    pod_labels = pod_of().metadata.labels
    assert all(selector.items() <= pod_labels.items() for selector in selectors.values())
    assert selectors["mirror-to-proxy"]["qlora-retrain.step"] == "mirror"
