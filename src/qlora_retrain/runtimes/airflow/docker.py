"""An Airflow task that runs a step in a container on the local engine (Docker, or Podman's Docker API).

The container is named from the step's key and the run. A retried task adopts the container of that name while it
runs, and removes it once it ended, so there are never two. What the container gets is in `container_spec.py`.

Environment: `DOCKER_HOST`, the engine's socket; and the variables that `container_spec.py` names.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk.exceptions import AirflowException
from docker.errors import APIError, DockerException, NotFound
from docker.types import DeviceRequest, Mount

from qlora_retrain.config import platform
from qlora_retrain.core import errors, graph, uris
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.pipeline import access
from qlora_retrain.runtimes import credentials, foreign_messages
from qlora_retrain.runtimes.airflow.operators import StepOperator, StepOutput, fail_task
from qlora_retrain.runtimes.docker import cleanup, container_ending, container_spec, log_lines
from qlora_retrain.storage.keys import KEYS_VARIABLE, step_role
from qlora_retrain.storage.local import LOCK_FILE

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.platform import RuntimeConfig
    from qlora_retrain.pipeline.plan import Plan


_RECONNECT_SECONDS = 0.5


class DockerStepOperator(StepOperator, DockerOperator):  # type: ignore[misc]
    """One step of the graph in a container; `runtime` is what the platform says for the line."""

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
        self._cleanup_process: subprocess.Popen[bytes] | None = None

    def run_step(self, plan: Plan, context: Context) -> None:
        """Start the container, or adopt the one that an earlier try left running; follow it to its end."""
        name = step_container_name(plan, self.step)
        output, exit_code = self.run_container(name, lambda: self._create_step_container(plan))
        limit = f"runtime.memory_gib is {self.runtime.memory_gib:g}" if self.runtime.memory_gib else "the machine's"
        ending = container_ending.read_ending(self.step, exit_code, output.ending, output.last_lines, limit)
        if exit_code != errors.Exit.DONE:
            fail_task(context, ending)

    def run_container(self, name: str, create: Callable[[], str]) -> tuple[StepOutput, int]:
        """Run a container, or follow the one of that name; return its output and its exit code.

        Args:
            name: The container's name.
            create: Creates the container without starting it, and returns its id.
        """
        self.container_name = name
        try:
            with contextlib.closing(self.cli):
                return self._follow_to_end(create)
        # The provider's hook raises AirflowException where it cannot connect.
        except (DockerException, OSError, AirflowException) as error:
            raise TryAgain(
                f"the container engine at {self.docker_url} failed: {error}", cause=Cause.THROTTLED
            ) from error

    def _follow_to_end(self, create: Callable[[], str]) -> tuple[StepOutput, int]:
        """Copy the container's log until the container ends; return the step's output and the exit code."""
        container_id = self._adopt_running_container()
        if container_id is None:
            self._pull_if_absent()
            container_id = create()
            self.cli.start(container_id)
        else:
            self.log.info("container %s runs already: following it", self.container_name)

        output = StepOutput(None, "")
        since = 1  # Unix time in seconds: from the beginning of the log; docker-py refuses 0
        while True:
            with self._stream_log(container_id, since) as chunks:
                latest = self.copy_output(log_lines.split_lines(chunks))
            output = StepOutput(latest.ending or output.ending, latest.last_lines or output.last_lines)

            # The end of the stream is no proof, because engines sometimes end it early. The container's state is.
            since = int(time.time())
            exit_code = self._exit_code_if_ended(container_id)
            if exit_code is not None:
                return output, exit_code
            self.log.warning("the engine ended the log of a container that still runs; following the log again")
            time.sleep(_RECONNECT_SECONDS)

    @contextlib.contextmanager
    def _stream_log(self, container_id: str, since: int) -> Iterator[Iterator[bytes]]:
        """Stream the log from `since` (Unix time in seconds) on, as it is written.

        docker-py never closes the connection of a stream that is cut off, so this collects the responses and closes
        them itself.
        """
        responses: list[Any] = []

        def record_response(response: Any, **_: Any) -> None:
            responses.append(response)

        # `hooks` is of requests, on which docker-py's client is built: it gets every response.
        self.cli.hooks["response"].append(record_response)
        try:
            with contextlib.closing(self.cli.logs(container_id, stream=True, follow=True, since=since)) as chunks:
                yield chunks
        finally:
            self.cli.hooks["response"].remove(record_response)
            for response in responses:
                response.close()

    def on_kill(self) -> None:
        """Start a process that stops and removes the container; Airflow gives this task itself only five seconds."""
        if self.container_name:
            self._cleanup_process = subprocess.Popen(
                [sys.executable, "-I", cleanup.__file__, self.docker_url, self.container_name],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def stop_step(self) -> None:
        """Stop and remove the container; a step that trains saves its work first."""
        self.on_kill()
        if self._cleanup_process is not None:
            self._cleanup_process.wait()

    def _exit_code_if_ended(self, container_id: str) -> int | None:
        """Remove a container that ended and return its exit code; None while it runs.

        A missing container was removed by somebody else, so the step is tried again (75).
        """
        try:
            state = self.cli.inspect_container(container_id)["State"]
            if state["Running"]:
                return None
            exit_code = int(self.cli.wait(container_id)["StatusCode"])
        # Podman answers 500 instead of 404 while the container is being removed.
        except APIError as error:
            if not isinstance(error, NotFound) and not foreign_messages.CONTAINER_GONE.search(str(error)):
                raise
            return int(errors.Exit.TRY_AGAIN)

        self._remove_container(container_id)
        return exit_code

    def _adopt_running_container(self) -> str | None:
        """Return the id of a running container of this name; remove one that ended."""
        try:
            description = self.cli.inspect_container(self.container_name)
        except NotFound:
            return None

        # Of a container that ended unseen nothing is lost: the task has looked for its artifact before.
        if description["State"]["Running"]:
            return str(description["Id"])
        self._remove_container(description["Id"])
        return None

    def _pull_if_absent(self) -> None:
        try:
            self.cli.inspect_image(self.image)
        except NotFound:
            self.log.info("pulling %s", self.image)
            try:
                self.cli.pull(self.image)
                # `pull` reports some failures only in its output stream, so look again.
                self.cli.inspect_image(self.image)
            except APIError as error:
                raise UsageError(
                    f"image {self.image} is not on this engine and cannot be pulled ({error.explanation}); "
                    "build it with `make images`, or set runtime.light_image and runtime.train_image in platform.yaml"
                ) from error

    def _create_step_container(self, plan: Plan) -> str:
        """Create the step's container without starting it; return its id."""
        step = graph.step(self.step)
        source_uris = [source.uri for source in plan.sources.values() if source is not None]
        # Looked at again: the sources may have changed since the plan was made.
        local_sources = [source for source in plan.sources.values() if source and source.uri.startswith("file:")]
        source_access = platform.load().access(plan.root)
        mounted_uris = [
            uri
            for source in local_sources
            for uri in container_spec.mounted_uris(
                uris.local_path(source.uri), [f.path for f in source.files], source_access
            )
        ]

        return self.create_container(
            [*container_spec.step_command(self.step, plan.uri), *self.step_arguments],
            plan.root,
            # Of this task's line, whatever the plan says.
            access.write_folders(step, self.line, plan.run_id),
            source_uris=source_uris,
            mounted_uris=mounted_uris,
            gpus=container_spec.gpu_count(step, plan.step(self.step).config),
        )

    def create_container(
        self,
        command: list[str],
        root: str,
        folders: Iterable[str],
        *,
        source_uris: Sequence[str] = (),
        mounted_uris: Sequence[str] = (),
        gpus: int = 0,
    ) -> str:
        """Create a container with the step's credentials and keys, without starting it; return its id.

        Args:
            command: What it runs.
            root: The store.
            folders: The folders of a store in a folder that it writes; the others are read-only.
            source_uris: What it reads beside the store.
            mounted_uris: The files and folders of this machine among them.
            gpus: The number of its GPUs.
        """
        step = graph.step(self.step)
        keys = credentials.key_files(root, step_role(step, self.line))
        user = credentials.give_key_to(container_spec.container_user(root), keys)
        settings = credentials.own_environment(step, self.line)
        writable = container_spec.make_writable_paths(root, folders, LOCK_FILE)

        # One named volume for all containers of a user, so that the node cache outlives each of them.
        host_config = self.cli.create_host_config(
            **container_spec.host_config_options(self.runtime),
            mounts=[
                Mount(container_spec.WORK_DIR, container_spec.work_volume_name(user), type="volume"),
                *(
                    Mount(container_path, host_path, type="bind", read_only=read_only)
                    for host_path, container_path, read_only in container_spec.bind_mounts(
                        root, mounted_uris, settings, writable
                    )
                ),
                *(
                    Mount(f"{credentials.KEYS_DIR}/{file.name}", str(file.resolve()), type="bind", read_only=True)
                    for file in keys
                ),
            ],
            device_requests=[DeviceRequest(count=gpus, capabilities=[["gpu"]])] if gpus else None,
            shm_size=container_spec.SHARED_MEMORY_BYTES if gpus > 1 else None,
        )

        # If this worker dies before the container is started, the next try finds it by its name and removes it.
        container = self.cli.create_container(
            self.image,
            name=self.container_name,
            command=command,
            environment={
                **container_spec.environment(self.runtime, [root, *source_uris], settings),
                "QLORA_RETRAIN_IMAGE": self.image,
                **({KEYS_VARIABLE: credentials.KEYS_DIR} if keys else {}),
            },
            user=user,
            host_config=host_config,
            labels={container_spec.STEP_LABEL: self.step},
        )
        return str(container["Id"])

    def _remove_container(self, container_id: str) -> None:
        try:
            self.cli.remove_container(container_id, force=True)
        except APIError as error:  # it is missing, or being removed already
            self.log.info("container %s was not removed: %s", self.container_name, error.explanation)


def step_container_name(plan: Plan, step: str) -> str:
    """Name a step's container: one for each key and run, the same for every try."""
    return f"qlora-retrain-{step}-{plan.step(step).key[:12]}-{plan.run_id}"
