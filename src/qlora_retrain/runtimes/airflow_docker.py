"""An Airflow task that runs a step in a container on the local engine (Docker, or Podman's Docker API).

The container is named from the step's key and the run. A task that is tried again adopts the container of that name
while it runs, and removes it once it ended, so there are never two. It gets a read-only root, no capabilities, no new
privileges, the engine's seccomp profile, the image's own user, and limits. What it may see of the host: the line's
sources and a `file://` store at their own paths, the AWS credentials file, and a volume for its work.

Environment: `DOCKER_HOST`, the engine's socket; `AWS_SHARED_CREDENTIALS_FILE`, mounted read-only. No other credential
enters a container, so none can be in its settings: secrets in `AWS_SECRET_ACCESS_KEY` stay with the worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk.exceptions import AirflowException
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount

from qlora_retrain import errors, graph, uris
from qlora_retrain.errors import TryAgain, UsageError
from qlora_retrain.runtimes import docker_sweep
from qlora_retrain.runtimes.airflow_steps import StepOperator, fail

if TYPE_CHECKING:
    from qlora_retrain.config.sections import RuntimeConfig
    from qlora_retrain.plan import Plan

WORK = "/work"  # the node cache and the step's own files; the image gives it to its user
VOLUME = "qlora-retrain-work"
CREDENTIALS = "/run/secrets/aws-credentials"
# Settings that are no secrets, passed on where the worker has them.
PASSED_ON = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ROLE_ARN",
)
LABEL = "qlora-retrain.step"


class DockerStepOperator(StepOperator, DockerOperator):  # type: ignore[misc]
    """One step of the graph in a container; `runtime` is the line's section of that name."""

    def __init__(self, *, step: str, line: str, runtime: RuntimeConfig, **kwargs: Any) -> None:
        super().__init__(
            step=step,
            line=line,
            image=runtime.image(graph.step(step).image),
            network_mode=runtime.network,
            mount_tmp_dir=False,
            do_xcom_push=False,
            **kwargs,
        )
        self.runtime = runtime
        self._sweep: subprocess.Popen[bytes] | None = None

    def run_step(self, plan: Plan) -> None:
        """Start the container, or adopt the one that an earlier try left running; follow it to its end."""
        self.container_name = name_of(plan, self.step)
        try:
            found = self._earlier()
            if found is None:
                self._pull_if_absent()
                found = self._created(plan)
                self.cli.start(found)
            else:
                self.log.info("container %s runs already: following it", self.container_name)
            reason = self.last_lines(_lines(self.cli.logs(found, stream=True, follow=True)))
            status = self._status(found)
        except (DockerException, OSError, AirflowException) as error:  # the last as the provider's hook says it
            raise TryAgain(f"{self.step}: the container engine at {self.docker_url} failed: {error}") from error
        if status == errors.Exit.OUT_OF_MEMORY:
            limit = f"runtime.memory_gib is {self.runtime.memory_gib}" if self.runtime.memory_gib else "the machine's"
            reason = f"killed, as for memory (limit: {limit}); last: {reason}"
        if status != errors.Exit.DONE:
            fail(status, reason)

    def on_kill(self) -> None:
        """Have the container stopped and removed by a process that outlives this task's five seconds."""
        if self.container_name:
            self._sweep = subprocess.Popen(
                [sys.executable, "-I", docker_sweep.__file__, self.docker_url, self.container_name],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def _status(self, container: str) -> int:
        """The exit code of a container that ended, which is removed; one that is gone was stopped from outside."""
        try:
            status = int(self.cli.wait(container)["StatusCode"])
        except APIError as error:  # Podman says it with a 500 while the container is being removed
            if not isinstance(error, NotFound) and "no such container" not in str(error):
                raise
            return int(errors.Exit.TRY_AGAIN)
        self._remove(container)
        return status

    def _earlier(self) -> str | None:
        """The id of a running container of this name; one that ended is removed."""
        try:
            found = self.cli.inspect_container(self.container_name)
        except NotFound:
            return None
        if found["State"]["Running"]:
            return str(found["Id"])
        self._remove(found["Id"])
        return None

    def _pull_if_absent(self) -> None:
        try:
            self.cli.inspect_image(self.image)
        except NotFound:
            self.log.info("pulling %s", self.image)
            try:
                self.cli.pull(self.image)
                self.cli.inspect_image(self.image)
            except APIError as error:
                raise UsageError(
                    f"{self.step}: image {self.image} is not on this engine, nor to be pulled ({error.explanation}); "
                    "build it with `make images`, or set runtime.light_image and runtime.train_image"
                ) from error

    def _created(self, plan: Plan) -> str:
        step, limit = graph.step(self.step), self.runtime.memory_gib
        gpus = step.gpus if plan.step(self.step).config.get("device") == "cuda" else 0
        host = self.cli.create_host_config(
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            privileged=False,
            pids_limit=self.runtime.pids,
            mem_limit=int(limit * 2**30) if limit else None,
            nano_cpus=int(self.runtime.cpus * 1e9) if self.runtime.cpus else None,
            tmpfs={"/tmp": "rw,nosuid,nodev,size=1g"},  # noqa: S108 - the container's own
            mounts=mounts(plan),
            network_mode=self.network_mode,
            device_requests=[DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus else None,
        )
        made = self.cli.create_container(
            self.image,
            name=self.container_name,
            command=command(self.step, plan.uri),
            environment=environment(self.image),
            user=user(plan),
            host_config=host,
            labels={LABEL: self.step},
        )
        return str(made["Id"])

    def _remove(self, container: str) -> None:
        try:
            self.cli.remove_container(container, force=True)
        except APIError as error:  # gone, or going: nothing depends on it any more
            self.log.info("container %s was not removed: %s", self.container_name, error.explanation)


def command(step: str, plan_uri: str) -> list[str]:
    """The one command line of a step, as the image's first process gets it."""
    return ["python", "-m", f"components.{step}", "--plan", plan_uri]


def name_of(plan: Plan, step: str) -> str:
    """A container's name: one for a key and a run, whichever try."""
    return f"qlora-retrain-{step}-{plan.step(step).key[:12]}-{plan.run_id}"


def environment(image: str) -> Mapping[str, str]:
    """What a container is told; never a secret."""
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if os.environ.get("AWS_SHARED_CREDENTIALS_FILE"):
        found["AWS_SHARED_CREDENTIALS_FILE"] = CREDENTIALS
    return {**found, "QLORA_RETRAIN_IMAGE": image, "QLORA_RETRAIN_CACHE": f"{WORK}/cache"}


def mounts(plan: Plan) -> list[Mount]:
    """What a container sees of the host, each at the path that the plan names."""
    found = [Mount(WORK, VOLUME, type="volume")]
    found += [_bind(path, read_only=True) for path in sorted(set(_source_paths(plan)))]
    if plan.root.startswith("file:"):
        found.append(_bind(uris.local_path(plan.root), read_only=False))
    credentials = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    if credentials:
        found.append(Mount(CREDENTIALS, str(Path(credentials).resolve()), type="bind", read_only=True))
    return found


def user(plan: Plan) -> str | None:
    """The image's own user; with a store in a folder, the worker's, which owns that folder.

    Raises:
        UsageError: If that would be root.
    """
    if not plan.root.startswith("file:"):
        return None
    if os.getuid() == 0:
        raise UsageError(
            f"{plan.root}: a container must not run as root, and this worker does: run Airflow as another user, "
            "or keep the store in S3"
        )
    return f"{os.getuid()}:{os.getgid()}"


def _source_paths(plan: Plan) -> Iterator[Path]:
    for source in plan.sources.values():
        if source is not None and source.uri.startswith("file:"):
            yield uris.local_path(source.uri)


def _bind(path: Path, *, read_only: bool) -> Mount:
    return Mount(str(path), str(path), type="bind", read_only=read_only)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Whole lines of a stream that comes in any pieces."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")
