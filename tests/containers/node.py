"""A Kubernetes node played by podman: a pod's spec becomes options of `podman run`, its end becomes a pod status.

Each field of the spec is translated as a kubelet would do it, or is in `LEFT_OUT` with the reason. A field that is
neither is an error. `podman play kube` would silently skip a field that it does not know.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kubernetes.client import ApiClient
from kubernetes.utils.quantity import parse_quantity

from qlora_retrain.core.errors import Exit

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

LEFT_OUT = {
    "metadata.namespace": "podman has none",
    "nodeSelector": "there is one node",
    "tolerations": "there is one node, and it has no taint",
    "priorityClassName": "nobody else wants the node",
    "activeDeadlineSeconds": "no test waits for hours; what a kubelet does then is in tests/runtimes/kubernetes",
    "hostNetwork": "it says false; but the store is on this machine's loopback, so the container is there too",
    "securityContext.fsGroupChangePolicy": "every volume is new",
    "containers.resources.requests.memory": "for the scheduler",
    "containers.resources.requests.ephemeral-storage": "for the scheduler",
    "containers.resources.requests.nvidia.com/gpu": "for the scheduler",
    "containers.resources.limits.nvidia.com/gpu": "this machine has none; the plan says so",
    "containers.resources.limits.ephemeral-storage": "each volume has its own size; the root is read-only",
    "volumes.ephemeral.volumeClaimTemplate.spec.accessModes": "for the driver",
    "volumes.ephemeral.volumeClaimTemplate.spec.storageClassName": "for the driver",
}
TOKEN = "/var/run/secrets/eks.amazonaws.com/serviceaccount"
MESSAGE_LINES, MESSAGE_BYTES = 80, 2048  # what a kubelet keeps of the log of a container that failed


@dataclass
class Node:
    """A node that runs pods.

    Attributes:
        folder: Holds the volumes; every user can read it.
        engine: Podman.
        secrets: The namespace's secrets: name -> key -> value.
        claims: The namespace's volume claims: name -> a folder that outlives a pod.
        roles: Service account -> (role, token), which EKS gives to the account's pods.
        logs: The logs of the pods that ended.
        statuses: Their final states, as JSON.
    """

    folder: Path
    engine: Engine
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)
    roles: dict[str, tuple[str, str]] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def start(self, pod: dict[str, Any]) -> None:
        """Make the pod's volumes, and run its container."""
        self.engine(*self.command(pod))

    def evict(self, pod: dict[str, Any]) -> None:
        """Evict (or drain, or delete) the pod: SIGTERM, and SIGKILL when the grace period is over."""
        self.engine("stop", pod["metadata"]["name"])
        pod["metadata"]["deletionTimestamp"] = "2026-01-31T03:00:00Z"

    def wait_until_ended(self, pod: dict[str, Any]) -> Any:
        """Wait for the pod's end and remove it with its volumes; return the V1Pod that the API would show."""
        name = pod["metadata"]["name"]
        exit_code = int(self.engine("wait", name))
        state = json.loads(self.engine("inspect", "--format", "{{json .State}}", name))
        # A kubelet's runtime notices that the kernel killed it; podman does not, on a machine with cgroups v1 and v2.
        killed = state["OOMKilled"] or exit_code == Exit.OUT_OF_MEMORY
        reason = "OOMKilled" if killed else "Error" if exit_code else "Completed"
        self.logs.append(self._log(name))
        terminated = {"exitCode": exit_code, "reason": reason, "message": self._termination_message(pod, exit_code)}
        self._remove(name)

        details = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": {"terminated": terminated}}
        (container,) = pod["spec"]["containers"]
        status = {
            "phase": "Failed" if exit_code else "Succeeded",
            "containerStatuses": [{"name": container["name"], **details}],
        }
        self.statuses.append(json.dumps({**pod, "status": status}))
        return ApiClient().deserialize(SimpleNamespace(data=self.statuses[-1]), "V1Pod")

    def volume(self, pod: dict[str, Any], name: str) -> Path:
        """Return the folder of one of the pod's own volumes, while the pod exists."""
        return self._home(pod) / name

    def remove_everything(self) -> None:
        """Remove the pods that are left, with their volumes."""
        for home in self.folder.glob("pod-*"):
            self._remove(home.name.removeprefix("pod-"))

    def _remove(self, name: str) -> None:
        self.engine("rm", "--force", "--ignore", name)
        home = self.folder / f"pod-{name}"
        for volume in home.iterdir():
            if volume.is_mount():
                subprocess.run(["umount", volume], check=True)
        shutil.rmtree(home)

    def command(self, pod: dict[str, Any]) -> list[str]:
        """Translate a pod to podman's arguments, and make its volumes.

        Raises:
            AssertionError: If the pod has a field that is neither translated nor in `LEFT_OUT`.
        """
        self._home(pod).mkdir()
        termination_log = self._home(pod) / "termination-log"
        termination_log.touch()
        termination_log.chmod(0o666)

        # Every field that is translated is taken out of this copy, so what remains at the end was forgotten.
        remaining = copy.deepcopy(pod["spec"])
        remaining["metadata"] = {**pod["metadata"]}
        (box,) = remaining["containers"]
        name, group = remaining["metadata"].pop("name"), remaining["securityContext"].pop("fsGroup")
        assert remaining.pop("restartPolicy") == "Never"
        assert remaining.pop("automountServiceAccountToken") is False, "podman mounts none"
        assert box.pop("terminationMessagePolicy") == "FallbackToLogsOnError", "see _termination_message"
        assert box.pop("name") == "base"

        options = {
            "name": [name],
            "hostname": [name],
            "label": [f"{key}={value}" for key, value in remaining["metadata"].pop("labels").items()],
            "annotation": [f"{key}={value}" for key, value in remaining["metadata"].pop("annotations").items()],
            "pull": ["never"],
            "restart": ["no"],
            "group-add": [str(group)],
            **_confined(remaining["securityContext"], box["securityContext"]),
            "stop-timeout": [str(remaining.pop("terminationGracePeriodSeconds"))],
            "env": [f"{item['name']}={item['value']}" for item in box.pop("env")],
            "volume": [f"{self._home(pod)}/termination-log:/dev/termination-log"],
        }
        for key, values in (
            *self._resources(box["resources"]),
            *self._account(pod, remaining.pop("serviceAccountName")),
        ):
            options[key] = [*options.get(key, ()), *values]

        volumes = {volume.pop("name"): volume for volume in remaining["volumes"]}
        for mount in box.pop("volumeMounts"):
            access = "ro" if mount.get("readOnly") else "rw"
            folder = self._volume(pod, mount["name"], volumes[mount["name"]], group)
            options["volume"].append(f"{folder}:{mount['mountPath']}:{access}")

        flags = [f"--{key}={value}" for key, values in options.items() for value in values]
        arguments = ["run", "--detach", *flags, box.pop("image"), *box.pop("args")]
        unknown = {
            path for path in _paths(remaining) if not any(f"{path}.".startswith(f"{field}.") for field in LEFT_OUT)
        }
        assert not unknown, f"neither translated nor left out for a reason: {sorted(unknown)}"
        return arguments

    def _resources(self, resources: dict[str, Any]) -> list[tuple[str, list[str]]]:
        """Translate memory to a limit without swap, and cores to a weight, since a pod has no limit of cores."""
        options = []
        if memory := resources["limits"].pop("memory", None):
            options += [(key, [str(int(parse_quantity(memory)))]) for key in ("memory", "memory-swap")]
        if cores := resources["requests"].pop("cpu", None):
            options.append(("cpu-shares", [str(int(parse_quantity(cores) * 1024))]))
        return options

    def _account(self, pod: dict[str, Any], account: str) -> list[tuple[str, list[str]]]:
        """Add what EKS's webhook adds to the pods of an account that has a role."""
        if account not in self.roles:
            return []
        role, token = self.roles[account]
        folder = self._files(pod, "token", {"token": token}, pod["spec"]["securityContext"]["fsGroup"], 0o640)
        variables = [f"AWS_ROLE_ARN={role}", f"AWS_WEB_IDENTITY_TOKEN_FILE={TOKEN}/token"]
        return [("env", variables), ("volume", [f"{folder}:{TOKEN}:ro"])]

    def _volume(self, pod: dict[str, Any], name: str, volume: dict[str, Any], group: int) -> Path:
        """Make a folder with the volume's first contents and its size."""
        if "secret" in volume:
            secret = volume.pop("secret")
            return self._files(pod, name, self.secrets[secret.pop("secretName")], group, secret.pop("defaultMode"))
        if "persistentVolumeClaim" in volume:
            return self.claims[volume.pop("persistentVolumeClaim")["claimName"]]
        if "emptyDir" in volume:
            empty = volume["emptyDir"]
            assert empty.pop("medium", "Memory") == "Memory", "here every one is a tmpfs, because that has a size limit"
            return self._sized(pod, name, empty.pop("sizeLimit"), group, 0o2777)
        claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        return self._sized(
            pod, name, claim["resources"]["requests"].pop("storage"), group, 0o2775
        )  # a new disk is root's

    def _sized(self, pod: dict[str, Any], name: str, size: str, group: int, mode: int) -> Path:
        folder = self._home(pod) / name
        folder.mkdir()
        options = f"size={int(parse_quantity(size))},uid=0,gid={group},mode={mode:o}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        return folder

    def _files(self, pod: dict[str, Any], name: str, files: dict[str, str], group: int, mode: int) -> Path:
        """Lay secrets and tokens out as a kubelet does: links to links, so that all of them can change at once."""
        folder = self._home(pod) / name
        (folder / "..2026_01_31").mkdir(parents=True)
        (folder / "..data").symlink_to("..2026_01_31")
        for key, text in files.items():
            real = folder / "..2026_01_31" / key
            real.write_text(text)
            subprocess.run(["chown", f"0:{group}", real], check=True)
            real.chmod(mode)
            (folder / key).symlink_to(f"..data/{key}")
        return folder

    def _termination_message(self, pod: dict[str, Any], exit_code: int) -> str:
        """Return what the container wrote as its termination message; if it failed without one, the end of its log."""
        message = (self._home(pod) / "termination-log").read_text()
        if message or not exit_code:
            return message
        return "\n".join(self.logs[-1].splitlines()[-MESSAGE_LINES:])[-MESSAGE_BYTES:]

    def _home(self, pod: dict[str, Any]) -> Path:
        return self.folder / f"pod-{pod['metadata']['name']}"

    def _log(self, name: str) -> str:
        completed = subprocess.run(
            ["podman", "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        return completed.stdout


def _confined(pod_context: dict[str, Any], container_context: dict[str, Any]) -> dict[str, list[str]]:
    """Translate the security contexts of a pod and its container; podman's own defaults are only asserted."""
    assert pod_context.pop("runAsNonRoot") is container_context.pop("runAsNonRoot") is True
    assert pod_context["runAsUser"] > 0
    assert pod_context.pop("seccompProfile") == container_context.pop("seccompProfile") == {"type": "RuntimeDefault"}
    assert container_context.pop("privileged") is False
    return {
        "user": [f"{pod_context.pop('runAsUser')}:{pod_context.pop('runAsGroup')}"],
        "security-opt": [] if container_context.pop("allowPrivilegeEscalation") else ["no-new-privileges"],
        "cap-drop": container_context["capabilities"].pop("drop"),
        "read-only": [str(container_context.pop("readOnlyRootFilesystem")).lower()],
        "read-only-tmpfs": ["false"],  # a kubelet mounts what the spec names, and no more
    }


def _paths(node: Any, path: str = "") -> set[str]:
    """List the dotted paths of every leaf; empty lists and maps have none."""
    if isinstance(node, dict):
        return {leaf for key, value in node.items() for leaf in _paths(value, f"{path}.{key}".lstrip("."))}
    if isinstance(node, list):
        return {leaf for item in node for leaf in _paths(item, path)}
    return {path}
