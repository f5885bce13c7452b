"""What a step's container gets: its limits and confinement, its environment, its mounts.

The names are those of Docker's API, which Podman has too. The Kubernetes and Kubeflow runtimes use the parts that are
the same for every container: the command, the work folder, the step's label. Standard library only.

Environment of the process that starts it: `FORWARDED_VARIABLES` are settings, which are passed on unchanged.
`CREDENTIAL_FILE_VARIABLES` name files that hold credentials or lead to them; each file is mounted read-only, and so is
`~/.aws/config` where `AWS_CONFIG_FILE` names no other. No other credential enters a container, so none can appear in
its settings: `AWS_SECRET_ACCESS_KEY` stays with the worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qlora_retrain.core import local_files, uris
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.platform import RuntimeConfig
    from qlora_retrain.core.graph import Step
    from qlora_retrain.core.source_access import SourceAccess

SHARED_MEMORY_BYTES = 2**30  # for NCCL in a container with several GPUs; an engine's default is 64 MiB
WORK_DIR = "/workspace"  # the node cache and the step's own files
SECRETS_DIR = "/run/secrets"
STEP_LABEL = "qlora-retrain.step"
FORWARDED_VARIABLES = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_ROLE_ARN",
    # How boto3 speaks to the server: a container must do it as the worker does.
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_DEFAULTS_MODE",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_STS_REGIONAL_ENDPOINTS",
)
CREDENTIAL_FILE_VARIABLES = (
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CA_BUNDLE",
)


def step_command(step: str, plan_uri: str) -> list[str]:
    """Build the one command line of a step, which the image's entrypoint runs."""
    return ["python", "-m", f"components.{step}", "--plan", plan_uri]


def host_config_options(runtime: RuntimeConfig) -> dict[str, Any]:
    """Confine a container: a read-only root, no capabilities, no new privileges, and limits.

    The engine's default seccomp profile stays in force, because no option here replaces it.
    """
    # `auto` is for pods: a Kubeflow pipeline that runs on this machine has no limit then.
    memory_gib = None if runtime.memory_gib == "auto" else runtime.memory_gib
    # Limits that are not set are None, which the engine reads as "no limit".
    return {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "privileged": False,
        "pids_limit": runtime.pids,
        "mem_limit": int(memory_gib * 2**30) if memory_gib else None,
        "nano_cpus": int(runtime.cpus * 1e9) if runtime.cpus else None,
        "tmpfs": {"/tmp": "rw,nosuid,nodev,size=1g"},  # noqa: S108 - the container's own
        "network_mode": runtime.network,
    }


def gpu_count(step: Step, config: Mapping[str, Any]) -> int:
    """Return the number of GPUs of a step's container: one for each process, none where the plan says `cpu`."""
    # Only training may have several processes; for the other steps the graph has the number.
    return int(config.get("num_processes", step.gpus)) if step.gpus and config.get("device") == "cuda" else 0


def environment(
    runtime: RuntimeConfig, store_and_source_uris: Iterable[str], settings: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Build a container's environment variables, except its image's name; never a secret.

    Args:
        runtime: What the platform says for the line.
        store_and_source_uris: The URIs that the step reads and writes.
        settings: The environment that is passed on; None: this process's.

    Raises:
        UsageError: If S3 is on this machine's loopback, and the container has a loopback of its own.
    """
    needs_s3 = any(uri.startswith("s3:") for uri in store_and_source_uris)
    settings = os.environ if settings is None else settings
    variables = {name: settings[name] for name in FORWARDED_VARIABLES if name in settings}

    # Without this check the step would fail with "connection refused", minutes later and without the reason.
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        host = urlsplit(variables.get(name, "")).hostname or ""
        if needs_s3 and runtime.network != "host" and (host in ("localhost", "::1") or host.startswith("127.")):
            raise UsageError(
                f"{name} is {variables[name]}, and runtime.network is {runtime.network}: in a container that is the "
                "container itself; set runtime.network: host in platform.yaml, or an address that containers reach"
            )

    return {
        **variables,
        **{name: _container_path(name) for name in _credential_files(settings)},
        "QLORA_RETRAIN_CACHE": f"{WORK_DIR}/cache",
    }


def bind_mounts(
    root: str,
    source_uris: Iterable[str],
    settings: Mapping[str, str] | None = None,
    writable: Iterable[str] | None = None,
) -> list[tuple[str, str, bool]]:
    """List the host paths that a container sees, as (path on the host, path in the container, read-only).

    Sources and a `file://` store are mounted at their own paths, so that their URIs mean the same inside.

    Args:
        root: The store.
        source_uris: The line's sources.
        settings: The environment that names files of credentials; None: this process's.
        writable: The paths of a `file://` store that the step writes, which must exist; None: all of it.
    """
    # A set, because two sources may be the same path, and an engine refuses a path that is mounted twice.
    sources = sorted({uris.local_path(uri) for uri in source_uris if uri.startswith("file:")})
    # Where the links lead to now: a link that is changed later mounts nothing else.
    mounts = [(os.path.realpath(path), str(path), True) for path in sources]
    if root.startswith("file:"):
        folder = uris.local_path(root)
        mounts.append((str(folder), str(folder), writable is not None))
        # On top of the store, which is read-only then.
        mounts += [(str(folder / path), str(folder / path), False) for path in sorted(writable or ())]
    files = _credential_files(os.environ if settings is None else settings)
    return mounts + [(str(path), _container_path(name), True) for name, path in files.items()]


def make_writable_paths(root: str, folders: Iterable[str], lock_file: str) -> list[str]:
    """Make the folders and the lock file of a `file://` store that a step's container writes; return their paths.

    An engine mounts only what exists. All of them belong to the store's owner, as whom the container runs.
    """
    if not root.startswith("file:"):
        return []
    store = uris.local_path(root)
    owner = store.stat()
    paths = [*folders, lock_file]
    for path in paths:
        missing = [p for p in (store / path, *(store / path).parents) if p.is_relative_to(store) and not p.exists()]
        for new in reversed(missing):
            if path == lock_file:
                new.touch(0o644)
            else:
                new.mkdir(mode=0o755, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(new, owner.st_uid, owner.st_gid)
    return paths


def mounted_uris(folder: Path, names: Iterable[str], access: SourceAccess) -> list[str]:
    """Return what to mount for a source in a folder: the folder, and the files that links in it lead to.

    Where the folder itself is no allowed place, as around a single file, it is the files alone.

    Raises:
        UsageError: If a file leads to a place that is not allowed.
    """
    paths = [folder / name for name in names]
    targets = [Path(local_files.resolve(path, access)) for path in paths if os.path.lexists(path)]
    resolved_folder = os.path.realpath(folder)
    if access.path_refusal(resolved_folder):
        return [path.as_uri() for path in paths]
    return [folder.as_uri(), *(target.as_uri() for target in targets if not target.is_relative_to(resolved_folder))]


def container_user(root: str) -> str | None:
    """Choose the user that a container runs as: the owner of a `file://` store, otherwise the image's own (None).

    Raises:
        UsageError: If that would be root.
    """
    # With S3 nothing on this machine is written, so the user of the image is right.
    if not root.startswith("file:"):
        return None

    # The store's files then belong to one user, whether a container or a local step wrote them.
    folder = uris.local_path(root)
    owner = folder.stat()
    if owner.st_uid == 0:
        raise UsageError(
            f"{folder}: the store belongs to root, and a container must not run as root: chown the folder to another "
            "user (10001 is that of the images), or keep the store in S3"
        )
    return f"{owner.st_uid}:{owner.st_gid}"


def work_volume_name(user: str | None) -> str:
    """Name the engine's volume for `WORK_DIR`; one for each user, since a user cannot write another's files."""
    return "qlora-retrain-work" + (f"-{user.partition(':')[0]}" if user else "")


def _credential_files(settings: Mapping[str, str]) -> Mapping[str, Path]:
    files = {name: Path(settings[name]) for name in CREDENTIAL_FILE_VARIABLES if settings.get(name)}
    if config := aws_config_file(settings):
        files["AWS_CONFIG_FILE"] = config
    return {name: path.resolve() for name, path in files.items()}


def aws_config_file(settings: Mapping[str, str]) -> Path | None:
    """Return the file from which this process's boto3 takes its settings; None where there is none."""
    # Without the variable it reads the one at home.
    default = Path(settings.get("HOME", "/")) / ".aws" / "config"
    named = Path(settings["AWS_CONFIG_FILE"]) if settings.get("AWS_CONFIG_FILE") else default
    return named if named.is_file() else None


def _container_path(variable: str) -> str:
    """Return where the file that a variable names is mounted in the container."""
    return f"{SECRETS_DIR}/{variable.lower().replace('_', '-')}"
