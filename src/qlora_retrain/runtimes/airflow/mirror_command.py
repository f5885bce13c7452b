"""Run `qlora-retrain mirror` with an account and a token of its own: as a subprocess of the worker, or in a pod.

It copies files and loads none, so it needs no container where the platform uses Docker. On Kubernetes it is a pod:
network policies and service accounts are of pods.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from qlora_retrain.config import platform
from qlora_retrain.config.mirrors import MLFLOW
from qlora_retrain.core import graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes import credentials
from qlora_retrain.runtimes.airflow.delivery import find_connection
from qlora_retrain.runtimes.airflow.publish_command import LocalCommand
from qlora_retrain.runtimes.airflow.supervised_process import environment_without_airflow
from qlora_retrain.storage import mirror_access
from qlora_retrain.storage.keys import MIRROR

if TYPE_CHECKING:
    from qlora_retrain.config.mirrors import MirrorConfig

# A worker's own, for other work: a mirror has the address and the token of its connection alone.
_FOREIGN = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_OIDC",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_",
    mirror_access.FOLDER_VARIABLE,
)


class MirrorCommand(Protocol):
    """A command that runs in one of the runtimes; see `PublishCommand`."""

    def run_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> Ending:
        """Run `qlora-retrain` with these arguments to its end."""

    def stop_step(self) -> None:
        """Stop the command at its deadline."""

    def on_kill(self) -> None:
        """Stop the command because Airflow ends the task."""


def mirror_command(line: str, entry: MirrorConfig) -> MirrorCommand:
    """Return the command for a mirror, in the runtime that the platform has for the line.

    Raises:
        UsageError: If the connection or the secret with its token is not there.
    """
    step = graph.producer_name("release")
    runtime = platform.load().runtime_of(line)
    if runtime.kind != "kubernetes":
        return LocalMirror(variables=_variables(entry), task_id=MIRROR, step=step, line=line)

    from qlora_retrain.config import cluster_profile
    from qlora_retrain.runtimes.airflow.mirror_pod import KubernetesMirror

    if entry.secret is None:
        raise UsageError(f"platform.yaml: mirrors: {entry.to}: needs secret, by which line {line} gets its token")
    profile = cluster_profile.from_environment()
    return KubernetesMirror(
        secret=entry.secret,
        destination=entry.to,
        task_id=MIRROR,
        step=step,
        line=line,
        runtime=runtime,
        profile=profile,
    )


class LocalMirror(LocalCommand):
    """A subprocess of the worker, with the credentials of the role `mirror` and the variables of one mirror."""

    command = MIRROR

    def __init__(self, *, variables: dict[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._variables = variables

    def process_environment(self) -> dict[str, str]:
        """Return what the process sees: nothing of Airflow's own, no other token, and this mirror's."""
        own = credentials.role_environment(environment_without_airflow(), MIRROR)
        return {**{k: v for k, v in own.items() if not k.startswith(_FOREIGN)}, **self._variables}


def _variables(entry: MirrorConfig) -> dict[str, str]:
    """Return the variables by which the command finds the server and shows who it is.

    Raises:
        UsageError: If the connection is not there, or lacks something.
    """
    if entry.connection is None:
        raise UsageError(f"platform.yaml: mirrors: {entry.to}: needs connection, by which the worker gets its token")
    connection = find_connection(entry.connection)
    host, password, login = connection.host or "", connection.password or "", connection.login or ""
    if host and not host.startswith(("https://", "http://")):
        raise UsageError(
            f"connection {entry.connection}: expected the whole URL as its host, such as https://server.example; leave "
            "schema and port empty"
        )
    if entry.to == MLFLOW:
        secrets = {"MLFLOW_TRACKING_USERNAME": login, "MLFLOW_TRACKING_PASSWORD": password} if login else {}
        own = {"MLFLOW_TRACKING_URI": host, **(secrets or {"MLFLOW_TRACKING_TOKEN": password})}
    elif not password:
        raise UsageError(
            f"connection {entry.connection}: has no password; it is the token that may write to {entry.to}"
        )
    else:
        own = {"HF_TOKEN": password, "HF_ENDPOINT": host}
    return {name: text for name, text in own.items() if text}
