"""The restricted Pod Security Standard of Kubernetes 1.32, control by control, as in its text; with `baseline`.

`deploy-check` asks it before a cluster does, and the tests ask it of every pod that the operator would send.
"""

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
    """List a pod's violations of the standard, as `where: control`; empty where the cluster would accept it."""
    return [
        *_pod_violations(pod),
        *_context_violations("pod", pod["spec"].get("securityContext") or {}),
        *_container_violations(pod["spec"]),
    ]


def _pod_violations(pod: dict[str, Any]) -> Iterator[str]:
    spec = pod["spec"]
    yield from (f"pod: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    yield from (f"volume {v['name']}" for v in spec.get("volumes") or () if set(v) - {"name"} - VOLUMES)
    sysctls = (spec.get("securityContext") or {}).get("sysctls") or ()
    yield from (f"pod: sysctl {s['name']}" for s in sysctls if s["name"] not in SYSCTLS)
    for name, value in (pod["metadata"].get("annotations") or {}).items():
        if name.startswith(APPARMOR) and value != "runtime/default" and not value.startswith("localhost/"):
            yield f"pod: annotation {name}"


def _context_violations(where: str, context: dict[str, Any]) -> Iterator[str]:
    """List what is forbidden in a pod's security context and in a container's, each on its own."""
    selinux = context.get("seLinuxOptions") or {}
    violations = {
        "root": context.get("runAsUser") == 0,
        "seccomp": (context.get("seccompProfile") or {}).get("type", "Localhost") not in PROFILES,
        "AppArmor": (context.get("appArmorProfile") or {}).get("type", "Localhost") not in PROFILES,
        "SELinux": selinux.get("type") not in SELINUX or bool(selinux.get("user") or selinux.get("role")),
        "hostProcess": bool((context.get("windowsOptions") or {}).get("hostProcess")),
    }
    yield from (f"{where}: {violation}" for violation, is_present in violations.items() if is_present)


def _container_violations(spec: dict[str, Any]) -> Iterator[str]:
    # The pod's security context applies where the container's own is silent.
    pod_context = spec.get("securityContext") or {}
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in [c for kind in kinds for c in spec.get(kind) or ()]:
        context = container.get("securityContext") or {}
        capabilities = context.get("capabilities") or {}
        violations = {
            "privileged": bool(context.get("privileged")),
            "escalation": context.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot": context.get("runAsNonRoot", pod_context.get("runAsNonRoot")) is not True,
            "no seccomp": not (context.get("seccompProfile") or pod_context.get("seccompProfile")),
            "capabilities": "ALL" not in (capabilities.get("drop") or ()),
            "added": bool(set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}),
            "procMount": context.get("procMount", "Default") != "Default",
            "hostPort": any(port.get("hostPort") for port in container.get("ports") or ()),
        }
        yield from (f"{container['name']}: {violation}" for violation, is_present in violations.items() if is_present)
        yield from _context_violations(container["name"], context)
