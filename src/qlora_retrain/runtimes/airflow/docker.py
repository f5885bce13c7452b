"""An Airflow task that runs a step in a container on the local engine (Docker, or Podman's Docker API).

The container is named from the step's key and the run. A task that is tried again adopts the container of that name
while it runs, and removes it once it ended, so there are never two. What it gets is in `containers.py`.

Environment: `DOCKER_HOST`, the engine's socket; and what `containers.py` names.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk.exceptions import AirflowException
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount

from qlora_retrain.core import errors, graph
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.runtimes.airflow.operators import StepOperator, fail
from qlora_retrain.runtimes.docker import container_spec, sweep

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.sections import RuntimeConfig
    from qlora_retrain.pipeline.plan import Plan


_AGAIN_SECONDS = 0.5


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

    def run_step(self, plan: Plan, context: Context) -> None:
        """Start the container, or adopt the one that an earlier try left running; follow it to its end."""
        self.container_name = name_of(plan, self.step)
        try:
            with contextlib.closing(self.cli):
                reason, status = self._followed(plan)
        except (DockerException, OSError, AirflowException) as error:  # the last as the provider's hook says it
            raise TryAgain(f"{self.step}: the container engine at {self.docker_url} failed: {error}") from error
        if status == errors.Exit.OUT_OF_MEMORY:
            limit = f"runtime.memory_gib is {self.runtime.memory_gib}" if self.runtime.memory_gib else "the machine's"
            reason = f"killed, as for memory (limit: {limit}); last: {reason}"
        if status != errors.Exit.DONE:
            fail(status, reason)

    def _followed(self, plan: Plan) -> tuple[str, int]:
        """The container's last lines and its exit code."""
        found = self._earlier()
        if found is None:
            self._pull_if_absent()
            found = self._created(plan)
            self.cli.start(found)
        else:
            self.log.info("container %s runs already: following it", self.container_name)
        reason, since = "", 1  # the log from its beginning: the engine takes no 0
        while True:
            with self._log(found, since) as chunks:
                reason = self.last_lines(_lines(chunks)) or reason
            since = int(time.time())
            status = self._status(found)
            if status is not None:
                return reason, status
            self.log.warning("the engine ended the log of a container that still runs: following it again")
            time.sleep(_AGAIN_SECONDS)

    @contextlib.contextmanager
    def _log(self, container: str, since: int) -> Iterator[Iterator[bytes]]:
        """The log from then on, as it is written. docker-py never closes the connection of one that is cut off."""
        answers: list[Any] = []

        def note(answer: Any, **_: Any) -> None:
            answers.append(answer)

        self.cli.hooks["response"].append(note)
        try:
            with contextlib.closing(self.cli.logs(container, stream=True, follow=True, since=since)) as chunks:
                yield chunks
        finally:
            self.cli.hooks["response"].remove(note)
            for answer in answers:
                answer.close()

    def on_kill(self) -> None:
        """Have the container stopped and removed by a process that outlives this task's five seconds."""
        if self.container_name:
            self._sweep = subprocess.Popen(
                [sys.executable, "-I", sweep.__file__, self.docker_url, self.container_name],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def _status(self, container: str) -> int | None:
        """The exit code of a container that ended, which is removed; None while it runs.

        One that is gone was stopped from outside.
        """
        try:
            state = self.cli.inspect_container(container)["State"]
            if state["Running"]:
                return None
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
        step = graph.step(self.step)
        gpus = container_spec.gpus(step, plan.step(self.step).config)
        sources = [source.uri for source in plan.sources.values() if source is not None]
        user = container_spec.user(plan.root)
        host = self.cli.create_host_config(
            **container_spec.confinement(self.runtime),
            mounts=[
                Mount(container_spec.WORK, container_spec.volume(user), type="volume"),
                *(
                    Mount(inside, outside, type="bind", read_only=read_only)
                    for outside, inside, read_only in container_spec.mounts(plan.root, sources)
                ),
            ],
            device_requests=[DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus else None,
            shm_size=container_spec.SHARED_MEMORY_BYTES if gpus > 1 else None,
        )
        made = self.cli.create_container(
            self.image,
            name=self.container_name,
            command=container_spec.command(self.step, plan.uri),
            environment={
                **container_spec.environment(self.runtime, [plan.root, *sources]),
                "QLORA_RETRAIN_IMAGE": self.image,
            },
            user=user,
            host_config=host,
            labels={container_spec.LABEL: self.step},
        )
        return str(made["Id"])

    def _remove(self, container: str) -> None:
        try:
            self.cli.remove_container(container, force=True)
        except APIError as error:  # gone, or going: nothing depends on it any more
            self.log.info("container %s was not removed: %s", self.container_name, error.explanation)


def name_of(plan: Plan, step: str) -> str:
    """A container's name: one for a key and a run, whichever try."""
    return f"qlora-retrain-{step}-{plan.step(step).key[:12]}-{plan.run_id}"


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Whole lines of a stream that comes in any pieces."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")
