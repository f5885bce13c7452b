"""A node's part in a pod's life, played by podman: its spec as options of `podman run`, its end as a status.

What the spec says is translated as a kubelet would do it, or is in `LEFT_OUT` with the reason. A field that is neither
is an error, so that nothing is skipped in silence, as `podman play kube` does with what it does not know.
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
    """Runs pods.

    Attributes:
        folder: For the volumes; every user may reach it.
        engine: Podman.
        secrets: The namespace's: name, key, value.
        claims: The namespace's, as folders that outlive a pod.
        roles: A service account's role and the token that says so, as EKS hands them to its pods.
        logs: Of the pods that ended.
        statuses: Of the same, as JSON.
    """

    folder: Path
    engine: Engine
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)
    roles: dict[str, tuple[str, str]] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def start(self, pod: dict[str, Any]) -> None:
        """Make its volumes, and run its container."""
        self.engine(*self.command(pod))

    def evict(self, pod: dict[str, Any]) -> None:
        """Or drain, or delete: SIGTERM, and SIGKILL when the grace is over."""
        self.engine("stop", pod["metadata"]["name"])
        pod["metadata"]["deletionTimestamp"] = "2026-01-31T03:00:00Z"

    def ended(self, pod: dict[str, Any]) -> Any:
        """Wait for its end, remove it with its volumes; the pod as the API would then show it, a V1Pod."""
        name = pod["metadata"]["name"]
        code = int(self.engine("wait", name))
        state = json.loads(self.engine("inspect", "--format", "{{json .State}}", name))
        # A kubelet's runtime sees the kill; podman, where the control groups are of both versions, does not.
        killed = state["OOMKilled"] or code == Exit.OUT_OF_MEMORY
        reason = "OOMKilled" if killed else "Error" if code else "Completed"
        self.logs.append(self._log(name))
        terminated = {"exitCode": code, "reason": reason, "message": self._message(pod, code)}
        self._remove(name)
        shown = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": {"terminated": terminated}}
        (container,) = pod["spec"]["containers"]
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": container["name"], **shown}],
        }
        self.statuses.append(json.dumps({**pod, "status": status}))
        return ApiClient().deserialize(SimpleNamespace(data=self.statuses[-1]), "V1Pod")

    def volume(self, pod: dict[str, Any], name: str) -> Path:
        """The folder of a volume of its own, while it is there."""
        return self._home(pod) / name

    def sweep(self) -> None:
        """Remove what is left."""
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
        """`podman`'s arguments for a pod, whose volumes it makes.

        Raises:
            AssertionError: If the pod says something that is neither translated nor left out for a reason.
        """
        self._home(pod).mkdir()
        message = self._home(pod) / "termination-log"
        message.touch()
        message.chmod(0o666)
        rest = copy.deepcopy(pod["spec"])
        rest["metadata"] = {**pod["metadata"]}
        (box,) = rest["containers"]
        name, group = rest["metadata"].pop("name"), rest["securityContext"].pop("fsGroup")
        assert rest.pop("restartPolicy") == "Never"
        assert rest.pop("automountServiceAccountToken") is False, "podman mounts none"
        assert box.pop("terminationMessagePolicy") == "FallbackToLogsOnError", "see _message"
        assert box.pop("name") == "base"
        options = {
            "name": [name],
            "hostname": [name],
            "label": [f"{key}={value}" for key, value in rest["metadata"].pop("labels").items()],
            "annotation": [f"{key}={value}" for key, value in rest["metadata"].pop("annotations").items()],
            "pull": ["never"],
            "restart": ["no"],
            "group-add": [str(group)],
            **_confined(rest["securityContext"], box["securityContext"]),
            "stop-timeout": [str(rest.pop("terminationGracePeriodSeconds"))],
            "env": [f"{item['name']}={item['value']}" for item in box.pop("env")],
            "volume": [f"{self._home(pod)}/termination-log:/dev/termination-log"],
        }
        for key, values in (*self._resources(box["resources"]), *self._account(pod, rest.pop("serviceAccountName"))):
            options[key] = [*options.get(key, ()), *values]
        at = {volume.pop("name"): volume for volume in rest["volumes"]}
        for mount in box.pop("volumeMounts"):
            access = "ro" if mount.get("readOnly") else "rw"
            where = self._volume(pod, mount["name"], at[mount["name"]], group)
            options["volume"].append(f"{where}:{mount['mountPath']}:{access}")
        words = [f"--{key}={value}" for key, values in options.items() for value in values]
        arguments = ["run", "--detach", *words, box.pop("image"), *box.pop("args")]
        unknown = {path for path in _paths(rest) if not any(f"{path}.".startswith(f"{known}.") for known in LEFT_OUT)}
        assert not unknown, f"neither translated nor left out for a reason: {sorted(unknown)}"
        return arguments

    def _resources(self, resources: dict[str, Any]) -> list[tuple[str, list[str]]]:
        """Memory as a limit without swap; cores as a weight, for there is no limit of them."""
        found = []
        if memory := resources["limits"].pop("memory", None):
            found += [(key, [str(int(parse_quantity(memory)))]) for key in ("memory", "memory-swap")]
        if cores := resources["requests"].pop("cpu", None):
            found.append(("cpu-shares", [str(int(parse_quantity(cores) * 1024))]))
        return found

    def _account(self, pod: dict[str, Any], account: str) -> list[tuple[str, list[str]]]:
        """What EKS's webhook adds to the pod of an account that has a role."""
        if account not in self.roles:
            return []
        role, token = self.roles[account]
        made = self._files(pod, "token", {"token": token}, pod["spec"]["securityContext"]["fsGroup"], 0o640)
        told = [f"AWS_ROLE_ARN={role}", f"AWS_WEB_IDENTITY_TOKEN_FILE={TOKEN}/token"]
        return [("env", told), ("volume", [f"{made}:{TOKEN}:ro"])]

    def _volume(self, pod: dict[str, Any], name: str, volume: dict[str, Any], group: int) -> Path:
        """A folder with what the volume has when a container starts, and of its size."""
        if "secret" in volume:
            secret = volume.pop("secret")
            return self._files(pod, name, self.secrets[secret.pop("secretName")], group, secret.pop("defaultMode"))
        if "persistentVolumeClaim" in volume:
            return self.claims[volume.pop("persistentVolumeClaim")["claimName"]]
        if "emptyDir" in volume:
            empty = volume["emptyDir"]
            assert empty.pop("medium", "Memory") == "Memory", "all of them are in memory here, that they have a size"
            return self._sized(pod, name, empty.pop("sizeLimit"), group, 0o2777)
        claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        return self._sized(
            pod, name, claim["resources"]["requests"].pop("storage"), group, 0o2775
        )  # a new disk is root's

    def _sized(self, pod: dict[str, Any], name: str, size: str, group: int, mode: int) -> Path:
        folder = self._home(pod) / name
        folder.mkdir()
        told = f"size={int(parse_quantity(size))},uid=0,gid={group},mode={mode:o}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", told, "tmpfs", folder], check=True)
        return folder

    def _files(self, pod: dict[str, Any], name: str, files: dict[str, str], group: int, mode: int) -> Path:
        """As a kubelet lays secrets and tokens out: links to links, so that all of them change at once."""
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

    def _message(self, pod: dict[str, Any], code: int) -> str:
        """What the container left for the status; where that is nothing and it failed, the end of its log."""
        left = (self._home(pod) / "termination-log").read_text()
        if left or not code:
            return left
        return "\n".join(self.logs[-1].splitlines()[-MESSAGE_LINES:])[-MESSAGE_BYTES:]

    def _home(self, pod: dict[str, Any]) -> Path:
        return self.folder / f"pod-{pod['metadata']['name']}"

    def _log(self, name: str) -> str:
        done = subprocess.run(
            ["podman", "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        return done.stdout


def _confined(whole: dict[str, Any], own: dict[str, Any]) -> dict[str, list[str]]:
    """The security contexts of a pod and of its container, as options; what podman does by itself is asserted alone."""
    assert whole.pop("runAsNonRoot") is own.pop("runAsNonRoot") is True
    assert whole["runAsUser"] > 0
    assert whole.pop("seccompProfile") == own.pop("seccompProfile") == {"type": "RuntimeDefault"}
    assert own.pop("privileged") is False
    return {
        "user": [f"{whole.pop('runAsUser')}:{whole.pop('runAsGroup')}"],
        "security-opt": [] if own.pop("allowPrivilegeEscalation") else ["no-new-privileges"],
        "cap-drop": own["capabilities"].pop("drop"),
        "read-only": [str(own.pop("readOnlyRootFilesystem")).lower()],
        "read-only-tmpfs": ["false"],  # a kubelet mounts what the spec names, and no more
    }


def _paths(rest: Any, at: str = "") -> set[str]:
    """The dotted names of what is left; empty lists and maps say nothing."""
    if isinstance(rest, dict):
        return {path for key, value in rest.items() for path in _paths(value, f"{at}.{key}".lstrip("."))}
    if isinstance(rest, list):
        return {path for item in rest for path in _paths(item, at)}
    return {at}
