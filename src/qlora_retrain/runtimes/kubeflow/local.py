"""Run the Kubeflow pipeline in containers on the local engine (Docker, or Podman's Docker API), without a cluster.

kfp's own local runner orders the containers and fills in their commands. They are confined like those of the docker
runtime (`container_spec.py`). The runner retries a failed step whatever its exit code, as a cluster does. How the run
ended is read from the store.

Environment: `DOCKER_HOST`, the engine's socket.
Command: `.venv-kfp/bin/qlora-retrain kfp run LINE.yaml --root URI`
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import docker
from docker.errors import DockerException, ImageNotFound
from docker.types import Mount
from kfp import local
from kfp.local import docker_task_handler

from qlora_retrain.config import platform
from qlora_retrain.config.cluster_profile import ClusterProfile, PodConfig
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import uris
from qlora_retrain.core.errors import Cause, Exit, TryAgain, UsageError
from qlora_retrain.core.graph import STEPS
from qlora_retrain.core.progress import say
from qlora_retrain.pipeline import explain, run_page, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes import credentials
from qlora_retrain.runtimes.docker import cleanup, container_spec
from qlora_retrain.runtimes.kubeflow import tasks
from qlora_retrain.runtimes.kubeflow.parameters import pipeline_parameters
from qlora_retrain.storage import key_admin, keys, open_store

RUN_LABEL = "qlora-retrain.kfp-run"
_ENGINE_FAILED = "the container engine at {} failed: {}; DOCKER_HOST names another"


def run(
    config_path: Path,
    root: str,
    profile: ClusterProfile,
    *,
    resume_run: str,
    overrides: Sequence[str],
    outputs: Path | None = None,
) -> int:
    """Run the pipeline to its end.

    Args:
        config_path: The line's YAML.
        root: The store's URI.
        profile: Names the images; nothing else of it applies here.
        resume_run: Another run of the store to finish, by its id; empty: make a new one.
        overrides: `section.field=value` strings.
        outputs: A folder to keep what KFP's UI would show; None: keep nothing.

    Returns:
        0, the exit code of the step that refused, or 75 where the same plan can be finished by another run.

    Raises:
        UsageError: For a line, an image or a store that cannot be used.
        TryAgain: If the engine does not answer.
    """
    config = load(config_path, overrides)
    root = uris.absolute(root)
    images = {name: _local_image_name(getattr(profile, name)) for name in ("light_image", "train_image")}
    pods = dict.fromkeys(("light", "train", "gpu"), PodConfig())
    profile = profile.model_copy(update={**images, **pods, "gpu_resource": None})
    # Containers run as the folder's owner, and an engine mounts no folder that is missing.
    if root.startswith("file:"):
        uris.local_path(root).mkdir(parents=True, exist_ok=True)
        # Here and not by task 0, whose container is gone afterwards, and the keys with it.
        key_admin.create_for_new_store(open_store(root), config.line)
    run_label, run_container = uuid.uuid4().hex, _ContainerRunner()
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)

    with tempfile.TemporaryDirectory(prefix="qlora-retrain-kfp-") as temporary:
        folder = (outputs or Path(temporary)).resolve() / run_label
        folder.mkdir(parents=True)
        folder.chmod(0o1777)  # the containers run as another user
        try:
            docker_task_handler.run_docker_container = run_container
            local.init(_docker_runner(root, config, run_label), pipeline_root=str(folder), raise_on_error=False)
            arguments = pipeline_parameters(config_path, root, resume_run=resume_run, overrides=overrides)
            tasks.load_pipeline(profile)(**arguments)
        except DockerException as error:
            raise TryAgain(_ENGINE_FAILED.format(_docker_host(), error), cause=Cause.THROTTLED) from error
        finally:
            _stop_containers(run_label)

        # KFP writes the plan task's output `uri` into a file of that name.
        plan_uri_file = next(folder.rglob("uri"), None)
        if plan_uri_file is None:
            say("the run ended before it had a plan; the output of its first task above says why")
            return run_container.plan_exit_code or Exit.BUG
        return _read_outcome(Plan.load(plan_uri_file.read_text()), config_path, root)


class _ContainerRunner:
    """Run a container to its end, in place of kfp's `run_docker_container`.

    kfp's function lets the engine remove a container as soon as it ends. Then its log is lost, and a failed container
    counts as one that succeeded (kubeflow/pipelines #13332). This class can be deleted when that issue is fixed.
    """

    def __init__(self) -> None:
        self.plan_exit_code: int | None = None  # of task 0, which is the first container

    def __call__(
        self, client: docker.DockerClient, image: str, command: list[str], volumes: Any, **settings: Any
    ) -> int:
        container = client.containers.run(image, command, detach=True, volumes=volumes, **settings)
        for line in container.logs(stream=True, follow=True):
            print(line.decode("utf-8", "replace"), end="")
        exit_code = int(container.wait(timeout=None)["StatusCode"])

        # Not in a `finally`: after Ctrl-C the container is stopped first, so that its step can save its work.
        container.remove(force=True)
        self.plan_exit_code = exit_code if self.plan_exit_code is None else self.plan_exit_code
        return exit_code


def _read_outcome(plan: Plan, config_path: Path, root: str) -> int:
    """Print the run's state and return its exit code, both read from the store and not from kfp's runner."""
    say(explain.status_text(plan))
    say(run_page.sentence(plan))
    refusal = run_page.find_refusal(plan)
    if refusal is not None:
        return refusal.exit_code
    if all(status.exit_code(plan, step.name) == Exit.DONE for step in STEPS):
        return Exit.DONE

    command = ["qlora-retrain", "kfp", "run", str(config_path), "--root", root, "--resume", plan.run_id]
    say(f"to continue this run: {shlex.join(command)}")
    return Exit.TRY_AGAIN


def _docker_runner(root: str, config: LineConfig, run_label: str) -> local.DockerRunner:
    user = container_spec.container_user(root) or (f"{os.getuid()}:{os.getgid()}" if os.getuid() else None)
    source_uris = config.sources.declared_uris().values()
    runtime = platform.load().runtime_of(config.line)
    mounts = [Mount(container_spec.WORK_DIR, container_spec.work_volume_name(user), type="volume")]
    mounts += [
        Mount(container_path, host_path, type="bind", read_only=read_only)
        for host_path, container_path, read_only in container_spec.bind_mounts(
            root, config.sources.declared_uris().values()
        )
    ]

    # All steps see all keys here: kfp's runner gives every container the same mounts.
    keyring = keys.find_keyring(root)
    keys_environment = {}
    if keyring is not None:
        credentials.give_key_to(user, list(keyring.folder.glob("*.pem")))
        mounts.append(Mount(credentials.KEYS_DIR, str(keyring.folder.resolve()), type="bind", read_only=True))
        keys_environment = {keys.KEYS_VARIABLE: credentials.KEYS_DIR}

    # kfp passes every option on to docker-py's `run`, which accepts no None for some of them.
    options: dict[str, Any] = {
        name: value for name, value in container_spec.host_config_options(runtime).items() if value is not None
    }
    return local.DockerRunner(
        **options,
        mounts=mounts,
        environment={**container_spec.environment(runtime, [root, *source_uris]), **keys_environment},
        labels={RUN_LABEL: run_label, container_spec.STEP_LABEL: "kfp"},
        **({"user": user} if user else {}),
    )


def _local_image_name(ref: str) -> str:
    """Return the image's name as the engine lists it.

    kfp searches the list for that exact text, and Podman's names begin with a host.
    """
    try:
        client = docker.from_env()
        image = client.images.get(ref)
    except ImageNotFound as error:
        raise UsageError(f"image {ref} is not on this engine; build it with `make images`") from error
    except DockerException as error:
        raise TryAgain(_ENGINE_FAILED.format(_docker_host(), error), cause=Cause.THROTTLED) from error
    return next((tag for tag in image.tags if tag == ref or tag.endswith(f"/{ref}")), ref)


def _docker_host() -> str:
    return os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")


def _stop_containers(run_label: str) -> None:
    """Stop the containers that an interrupted run left; a step that trains saves its work first."""
    # If the engine is gone, its error was raised before.
    with contextlib.suppress(DockerException, OSError):
        client = docker.from_env(timeout=cleanup.GRACE_SECONDS + 30)
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run_label}"}):
            say(f"stopping container {container.name}")
            cleanup.stop_and_remove(client.api, container.id)


def _raise_keyboard_interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
