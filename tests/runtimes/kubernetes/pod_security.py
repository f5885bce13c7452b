"""The restricted Pod Security Standard of Kubernetes 1.32, control by control of its text; it includes `baseline`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
}
SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = {"RuntimeDefault", "Localhost"}
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def restricted(pod: dict[str, Any]) -> list[str]:
    """What the standard finds in a pod, as `where: control`; empty where the cluster would take it."""
    return [*_pod(pod), *_anywhere("pod", pod["spec"].get("securityContext") or {}), *_containers(pod["spec"])]


def _pod(pod: dict[str, Any]) -> Iterator[str]:
    spec = pod["spec"]
    yield from (f"pod: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    yield from (f"volume {v['name']}" for v in spec.get("volumes") or () if set(v) - {"name"} - VOLUMES)
    sysctls = (spec.get("securityContext") or {}).get("sysctls") or ()
    yield from (f"pod: sysctl {s['name']}" for s in sysctls if s["name"] not in SYSCTLS)
    for name, value in (pod["metadata"].get("annotations") or {}).items():
        if name.startswith(APPARMOR) and value != "runtime/default" and not value.startswith("localhost/"):
            yield f"pod: annotation {name}"


def _anywhere(where: str, context: dict[str, Any]) -> Iterator[str]:
    """What neither a pod's security context nor a container's may say, whatever the other says."""
    selinux = context.get("seLinuxOptions") or {}
    faults = {
        "root": context.get("runAsUser") == 0,
        "seccomp": (context.get("seccompProfile") or {}).get("type", "Localhost") not in PROFILES,
        "AppArmor": (context.get("appArmorProfile") or {}).get("type", "Localhost") not in PROFILES,
        "SELinux": selinux.get("type") not in SELINUX or bool(selinux.get("user") or selinux.get("role")),
        "hostProcess": bool((context.get("windowsOptions") or {}).get("hostProcess")),
    }
    yield from (f"{where}: {fault}" for fault, is_so in faults.items() if is_so)


def _containers(spec: dict[str, Any]) -> Iterator[str]:
    whole = spec.get("securityContext") or {}
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in [c for kind in kinds for c in spec.get(kind) or ()]:
        own = container.get("securityContext") or {}
        capabilities = own.get("capabilities") or {}
        faults = {
            "privileged": bool(own.get("privileged")),
            "escalation": own.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot": own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True,
            "no seccomp": not (own.get("seccompProfile") or whole.get("seccompProfile")),
            "capabilities": "ALL" not in (capabilities.get("drop") or ()),
            "added": bool(set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}),
            "procMount": own.get("procMount", "Default") != "Default",
            "hostPort": any(port.get("hostPort") for port in container.get("ports") or ()),
        }
        yield from (f"{container['name']}: {fault}" for fault, is_so in faults.items() if is_so)
        yield from _anywhere(container["name"], own)
