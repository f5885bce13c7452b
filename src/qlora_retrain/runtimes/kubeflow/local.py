"""The Kubeflow pipeline in containers on the local engine (Docker, or Podman's Docker API), without a cluster.

kfp's own runner orders the containers and fills in their commands; they are confined as those of the docker runtime are
(`containers.py`). It tries a failed step again whatever its exit code, as a cluster does. How the run ended
is read from the store.

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

from qlora_retrain.config.line import LineConfig, document, load
from qlora_retrain.config.profile import Profile
from qlora_retrain.core import uris
from qlora_retrain.core.errors import Exit, TryAgain, UsageError
from qlora_retrain.core.graph import STEPS
from qlora_retrain.core.progress import say
from qlora_retrain.pipeline import execute, explain, run_page
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.docker import container_spec, sweep
from qlora_retrain.runtimes.kubeflow import components

RUN_LABEL = "qlora-retrain.kfp-run"
_ENGINE_FAILED = "the container engine at {} failed: {}; DOCKER_HOST names another"


def run(
    config_path: Path,
    root: str,
    profile: Profile,
    *,
    plan_uri: str,
    overrides: Sequence[str],
    outputs: Path | None = None,
) -> int:
    """Run the pipeline to its end.

    Args:
        config_path: The line's YAML.
        root: The store's URI.
        profile: Its images; nothing else of a cluster counts here.
        plan_uri: Finish this plan; empty: make one.
        overrides: `section.field=value` strings.
        outputs: Keep in this folder what KFP's UI would show; None: do not.

    Returns:
        0, the code of the step that refused, or 75 where the same plan can be gone on with.

    Raises:
        UsageError: For a line, an image or a store that cannot be used.
        TryAgain: If the engine does not answer.
    """
    config = load(config_path, overrides)
    root = uris.absolute(root)
    images = {name: _on_this_engine(getattr(profile, name)) for name in ("light_image", "train_image")}
    profile = profile.model_copy(update={**images, "gpu_resource": None})
    if root.startswith("file:"):
        uris.local_path(root).mkdir(parents=True, exist_ok=True)
    name, codes = uuid.uuid4().hex, _Containers()
    signal.signal(signal.SIGTERM, _as_interrupt)
    with tempfile.TemporaryDirectory(prefix="qlora-retrain-kfp-") as temporary:
        folder = (outputs or Path(temporary)).resolve() / name
        folder.mkdir(parents=True)
        folder.chmod(0o1777)  # the container's user is another
        try:
            docker_task_handler.run_docker_container = codes
            local.init(_runner(root, config, name), pipeline_root=str(folder), raise_on_error=False)
            line = document(load(config_path))
            components.pipeline(profile)(line=line, root=root, plan_uri=plan_uri, overrides=list(overrides))
        except DockerException as error:
            raise TryAgain(_ENGINE_FAILED.format(_engine(), error)) from error
        finally:
            _sweep(name)
        made = next(folder.rglob("uri"), None)
        if made is None:
            say("the run ended before it had a plan; its first task says why above")
            return codes.first or Exit.BUG
        return _judged(Plan.load(made.read_text()), config_path, root)


class _Containers:
    """Runs a container to its end, in place of kfp's function of that name.

    kfp's has the engine remove a container as soon as it ends; then its log is lost, and it is taken for one that
    succeeded (kubeflow/pipelines #13332). This goes when that is mended.
    """

    def __init__(self) -> None:
        self.first: int | None = None  # the exit code of task 0

    def __call__(
        self, client: docker.DockerClient, image: str, command: list[str], volumes: Any, **settings: Any
    ) -> int:
        made = client.containers.run(image, command, detach=True, volumes=volumes, **settings)
        for line in made.logs(stream=True, follow=True):
            print(line.decode("utf-8", "replace"), end="")
        code = int(made.wait(timeout=None)["StatusCode"])
        made.remove(force=True)  # not where this is interrupted: then it is stopped first, and may save
        self.first = code if self.first is None else self.first
        return code


def _judged(plan: Plan, config_path: Path, root: str) -> int:
    """What the store says of the run, whatever the engine said."""
    say(explain.status_text(plan))
    say(run_page.sentence(plan))
    refused = run_page.refusal_of(plan)
    if refused is not None:
        return refused.exit_code
    if all(execute.found(plan, step.name) == Exit.DONE for step in STEPS):
        return Exit.DONE
    command = ["qlora-retrain", "kfp", "run", str(config_path), "--root", root, "--plan", plan.uri]
    say(f"to go on where it stopped: {shlex.join(command)}")
    return Exit.TRY_AGAIN


def _runner(root: str, config: LineConfig, name: str) -> local.DockerRunner:
    user = container_spec.user(root) or (f"{os.getuid()}:{os.getgid()}" if os.getuid() else None)
    sources = config.sources.given().values()
    mounts = [Mount(container_spec.WORK, container_spec.volume(user), type="volume")]
    mounts += [
        Mount(i, o, type="bind", read_only=ro)
        for o, i, ro in container_spec.mounts(root, config.sources.given().values())
    ]
    settings: dict[str, Any] = {k: v for k, v in container_spec.confinement(config.runtime).items() if v is not None}
    return local.DockerRunner(
        **settings,
        mounts=mounts,
        environment=container_spec.environment(config.runtime, [root, *sources]),
        labels={RUN_LABEL: name, container_spec.LABEL: "kfp"},
        **({"user": user} if user else {}),
    )


def _on_this_engine(ref: str) -> str:
    """The image's name as the engine lists it: kfp looks for that text, and Podman's has a host in front."""
    try:
        client = docker.from_env()
        image = client.images.get(ref)
    except ImageNotFound as error:
        raise UsageError(f"image {ref} is not on this engine; build it with `make images`") from error
    except DockerException as error:
        raise TryAgain(_ENGINE_FAILED.format(_engine(), error)) from error
    return next((tag for tag in image.tags if tag == ref or tag.endswith(f"/{ref}")), ref)


def _engine() -> str:
    return os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")


def _sweep(name: str) -> None:
    """Stop what is left of an interrupted run; a step that trains saves its work first."""
    with contextlib.suppress(DockerException, OSError):  # an engine that went away has its own error already
        client = docker.from_env(timeout=sweep.GRACE_SECONDS + 30)
        for left in client.containers.list(filters={"label": f"{RUN_LABEL}={name}"}):
            say(f"stopping container {left.name}")
            sweep.sweep(client.api, left.id)


def _as_interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
