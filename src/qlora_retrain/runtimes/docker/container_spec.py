"""What a step's container gets, whoever starts it: how it is confined, what it is told, what it sees of the host.

The names are those of Docker's own API, which Podman speaks too. Standard library only.

Environment of whoever starts it: `PASSED_ON` are settings, passed on as they are; `FILES` name files that hold or lead
to credentials, and each is mounted read-only. No other credential enters a container, so none can be in its settings:
a secret in `AWS_SECRET_ACCESS_KEY` stays with the worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.sections import RuntimeConfig
    from qlora_retrain.core.graph import Step

SHARED_MEMORY_BYTES = 2**30  # of a container with several GPUs: NCCL's, engines allow 64 MiB by themselves
WORK = "/workspace"  # the node cache and the step's own files
SECRETS = "/run/secrets"
LABEL = "qlora-retrain.step"
PASSED_ON = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ROLE_ARN",
)
FILES = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CA_BUNDLE")


def command(step: str, plan_uri: str) -> list[str]:
    """The one command line of a step, as the image's first process gets it."""
    return ["python", "-m", f"components.{step}", "--plan", plan_uri]


def confinement(runtime: RuntimeConfig) -> dict[str, Any]:
    """A read-only root, no capabilities, no new privileges, the engine's own seccomp profile, and limits."""
    return {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "privileged": False,
        "pids_limit": runtime.pids,
        "mem_limit": int(runtime.memory_gib * 2**30) if runtime.memory_gib else None,
        "nano_cpus": int(runtime.cpus * 1e9) if runtime.cpus else None,
        "tmpfs": {"/tmp": "rw,nosuid,nodev,size=1g"},  # noqa: S108 - the container's own
        "network_mode": runtime.network,
    }


def gpus(step: Step, config: Mapping[str, Any]) -> int:
    """How many GPUs a step's container gets: one for each of its processes, none where the plan says `cpu`."""
    return int(config.get("processes", step.gpus)) if step.gpus and config.get("device") == "cuda" else 0


def environment(runtime: RuntimeConfig, places: Iterable[str]) -> dict[str, str]:
    """What a container is told beside its image's name; never a secret.

    Args:
        runtime: The line's section of that name.
        places: The URIs of the store and of the sources.

    Raises:
        UsageError: If S3 is on this machine's loopback, and the container has a loopback of its own.
    """
    needs_s3 = any(uri.startswith("s3:") for uri in places)
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        host = urlsplit(found.get(name, "")).hostname or ""
        if needs_s3 and runtime.network != "host" and (host in ("localhost", "::1") or host.startswith("127.")):
            raise UsageError(
                f"{name} is {found[name]}, and runtime.network is {runtime.network}: in a container that is the "
                "container itself; set runtime.network: host, or an address that containers reach"
            )
    return {**found, **{name: _inside(name) for name in _files()}, "QLORA_RETRAIN_CACHE": f"{WORK}/cache"}


def mounts(root: str, source_uris: Iterable[str]) -> list[tuple[str, str, bool]]:
    """(on the host, in the container, read-only) of what it sees: sources and a `file://` store at their own paths."""
    sources = sorted({uris.local_path(uri) for uri in source_uris if uri.startswith("file:")})
    found = [(str(path), str(path), True) for path in sources]
    if root.startswith("file:"):
        found.append((str(uris.local_path(root)), str(uris.local_path(root)), False))
    return found + [(str(path), _inside(name), True) for name, path in _files().items()]


def user(root: str) -> str | None:
    """Whom it runs as: the image's own user, or whoever owns the folder that is the store.

    Raises:
        UsageError: If that would be root.
    """
    if not root.startswith("file:"):
        return None
    folder = uris.local_path(root)
    owner = folder.stat()
    if owner.st_uid == 0:
        raise UsageError(
            f"{folder}: the store belongs to root, and a container must not run as root: give the folder to another "
            "user (10001 is the images' own), or keep the store in S3"
        )
    return f"{owner.st_uid}:{owner.st_gid}"


def volume(user: str | None) -> str:
    """The engine's volume for `WORK`: one a user, for what one user keeps another may not touch."""
    return "qlora-retrain-work" + (f"-{user.partition(':')[0]}" if user else "")


def _files() -> Mapping[str, Path]:
    return {name: Path(os.environ[name]).resolve() for name in FILES if os.environ.get(name)}


def _inside(name: str) -> str:
    return f"{SECRETS}/{name.lower().replace('_', '-')}"
