"""What a mirror's pod has otherwise than that of `publish`: its account, its token, its label.

It gets no private key and no right to write to the store. Its token is a mounted secret that no other pod sees, and its
label opens `mirror_egress` of the cluster's profile for it alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kubernetes.client import models as k8s

from qlora_retrain.core import graph
from qlora_retrain.runtimes import credentials
from qlora_retrain.runtimes.kubernetes import pod_spec
from qlora_retrain.runtimes.kubernetes.egress import MIRROR_LABEL as MIRROR_LABEL  # by which its policies select it
from qlora_retrain.storage.keys import KEYS_VARIABLE, MIRROR
from qlora_retrain.storage.mirror_access import FOLDER_VARIABLE

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig

SECRET_DIR = "/run/secrets/mirror"  # noqa: S105 - a folder


def pod_attributes(line: str, profile: ClusterProfile, runtime: RuntimeConfig, secret: str) -> dict[str, Any]:
    """Build the attributes of the operator in which a mirror's pod differs from that of `publish`."""
    # Without the keys of `publish`: whoever checks signatures needs the public ones.
    keyless = profile.model_copy(update={"key_secrets": None})
    arguments = pod_spec.operator_arguments(graph.step(graph.producer_name("release")), line, keyless, runtime)
    secrets = {SECRET_DIR: secret}
    variables = {FOLDER_VARIABLE: SECRET_DIR}
    if keys := profile.key_secret(MIRROR):
        secrets[credentials.KEYS_DIR] = keys
        variables[KEYS_VARIABLE] = credentials.KEYS_DIR
    volumes, mounts = list(arguments["volumes"]), list(arguments["volume_mounts"])
    for i, (folder, name) in enumerate(secrets.items()):
        source = k8s.V1SecretVolumeSource(secret_name=name, default_mode=0o440)
        volumes.append(k8s.V1Volume(name=f"mirror-{i}", secret=source))
        mounts.append(k8s.V1VolumeMount(name=f"mirror-{i}", mount_path=folder, read_only=True))
    return {
        "service_account_name": profile.mirror_account(),
        "env_vars": [*arguments["env_vars"], *(k8s.V1EnvVar(name=k, value=v) for k, v in variables.items())],
        "volumes": volumes,
        "volume_mounts": mounts,
    }
