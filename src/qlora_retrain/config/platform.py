"""The platform's settings: where steps run, in which images, and which sources lines may name.

They are in one file, `platform.yaml`, which is no line's: whoever writes a line, or starts a run of one, can change
none of them. It is the file that `QLORA_RETRAIN_PLATFORM` names; without that variable, `platform.yaml` in the
project's folder, beside `components/`. Where there is none, steps are subprocesses, and a source may lie wherever this
user may read. A file in the folder of the line that is read is refused, because the authors of lines write there.

Command: `qlora-retrain check CONFIG` shows what it says for a line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from qlora_retrain.config.consumers import ConsumerConfig
from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.gpus import CardName, GpuConfig
from qlora_retrain.config.mirrors import MirrorConfig, Mirrors
from qlora_retrain.config.notify import HookConfig, LineName, NotifyConfig
from qlora_retrain.config.yaml_reader import load_section
from qlora_retrain.core import images, source_access, uris
from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import Image
from qlora_retrain.core.source_access import SourceAccess

if TYPE_CHECKING:
    from qlora_retrain.config.line import LineConfig

PLATFORM_VARIABLE = "QLORA_RETRAIN_PLATFORM"
# Each ends with a slash, as a reminder that it is compared by whole parts.
SourcePrefix = Annotated[str, AfterValidator(lambda prefix: f"{source_access.canonical(prefix).rstrip('/')}/")]
# As Airflow's API names whoever signed in: it stands in the audit trail, where a space ends a name.
UserName = Annotated[str, Field(pattern=r"^\S{1,250}$")]
PoolName = Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")]
Priority = Annotated[int, Field(ge=1, le=1000)]
DEFAULT_PRIORITY = 1
# With `auto` a pod gets what the planner estimates for its step, when the pod is created.
MemoryGib = Annotated[float, Field(gt=0.0, le=4096)] | Literal["auto"]
DiskGib = Annotated[float, Field(gt=0.0, le=65_536)] | Literal["auto"]


class ImagesConfig(Section):
    """The images of the steps."""

    light_image: str = operational(
        images.DEFAULT_IMAGES["light"], "for steps without torch; a tag or digest, never latest"
    )
    train_image: str = operational(
        images.DEFAULT_IMAGES["train"], "for steps with torch; a tag or digest, never latest"
    )

    @field_validator("light_image", "train_image")
    @classmethod
    def _is_pinned(cls, value: str) -> str:
        # pydantic collects ValueErrors, so that all errors of a file come at once.
        try:
            return images.require_pinned(value)
        except UsageError as error:
            raise ValueError(str(error)) from None

    def image(self, kind: Image) -> str:
        """Return the image of a step."""
        return {"light": self.light_image, "train": self.train_image}[kind]


class RuntimeConfig(ImagesConfig):
    """Where the steps of a line run, and what they get there. Nothing in it changes a result."""

    kind: Literal["local", "docker", "kubernetes"] = operational(
        "local",
        "local: subprocesses of the worker; docker: containers; kubernetes: pods, as the cluster's profile says",
    )
    memory_gib: MemoryGib | None = operational(
        None,
        "a step that uses more is killed (137); null: no limit, on kubernetes the profile's; auto: kubernetes, as the "
        "plan estimates, at most the profile's max_memory_gib",
    )
    cpus: float | None = operational(
        None,
        "cores; docker: the limit, kubernetes: the pod's request; null: no limit, on kubernetes the profile's",
        gt=0.0,
        le=1024,
    )
    disk_gib: DiskGib | None = operational(
        None,
        "kubernetes: a pod's disk, for output and checkpoints; null: the profile's disk_gib; auto: as the plan "
        "estimates",
    )
    max_step_hours: float = operational(
        24.0, "a step other than training is stopped after this long, and the run ends (12)", gt=0.0, le=720.0
    )
    max_queue_hours: float = operational(
        72.0,
        "kubernetes: for how long a pod may wait behind scheduling gates, as in a queue of Kueue; then the run ends "
        "(12)",
        gt=0.0,
        le=8760.0,
    )
    deadline_hours: float | None = operational(
        None,
        "Airflow: a run that has not ended so long after it was queued is reported to `notify`; null: once its tasks "
        "have used up all of their time",
        gt=0.0,
        le=8760.0,
    )
    pause_after_failures: int | None = operational(
        None,
        "Airflow: the line is paused after so many failed runs in a row, and refused ones count as failed; null: never",
        ge=1,
        le=1000,
    )
    gpu: CardName | None = operational(
        None, "the card of the machines that train: a plan estimates for it; null: for this machine's memory"
    )
    gpu_pool: PoolName | None = operational(
        None, "local, docker: the Airflow pool of which a step that uses a GPU takes a slot; null: no pool"
    )
    pids: int = operational(1024, "docker: processes and threads a step may have", ge=16, le=65_536)
    network: str = operational("bridge", "docker: the network's name; host if the store is on this machine's loopback")

    @model_validator(mode="after")
    def _the_profile_names_the_images(self) -> RuntimeConfig:
        image_fields = sorted(self.model_fields_set & set(ImagesConfig.model_fields))
        if self.kind == "kubernetes" and image_fields:
            raise ValueError(
                f"{image_fields[0]} has no effect with kind: kubernetes; the cluster's profile names the images"
            )
        return self

    @model_validator(mode="after")
    def _the_profile_names_the_pool(self) -> RuntimeConfig:
        if self.kind == "kubernetes" and self.gpu_pool is not None:
            raise ValueError("gpu_pool: has no effect with kind: kubernetes; the cluster's profile names the pool")
        return self

    @model_validator(mode="after")
    def _only_pods_follow_the_plan(self) -> RuntimeConfig:
        for name in ("memory_gib", "disk_gib"):
            if self.kind != "kubernetes" and getattr(self, name) == "auto":
                raise ValueError(f"{name}: auto is for kind: kubernetes; expected a number or null with {self.kind}")
        return self


class PlatformConfig(Section):
    """What the platform's owner decides for every line."""

    runtime: RuntimeConfig = operational(RuntimeConfig(), "where the steps of every line run")
    lines: dict[LineName, RuntimeConfig] = operational({}, "by a line's name: used for it instead of `runtime`")
    sources: tuple[SourcePrefix, ...] | None = operational(
        None,
        "prefixes below which sources lie: file:///data/, s3://bucket/prefix/, hf://owner/; null: wherever this user "
        "may read",
    )
    gpus: dict[CardName, GpuConfig] = operational(
        {}, "by a card's name: its price an hour, and its memory if the built-in list lacks the card"
    )
    labs: tuple[LineName, ...] = operational(
        (), "lines that Airflow may train with several settings: each has a DAG LINE-lab, started by hand"
    )
    consumers: dict[LineName, ConsumerConfig] = operational(
        {}, "by a line's name: Airflow pulls and tries its new versions, in a DAG LINE-consume"
    )
    notify: tuple[NotifyConfig, ...] = operational((), "Airflow: who is told how a run ended, by which connection")
    hooks: tuple[HookConfig, ...] = operational(
        (), "Airflow: servers that are told to load the new model, after `production` moved"
    )
    mirrors: Mirrors = operational(
        (), "Airflow: where a line may mirror its versions to (publish.mirror), and where the tokens are"
    )
    approvers: dict[LineName, Annotated[tuple[UserName, ...], Field(min_length=1)]] = operational(
        {},
        "by a line's name: the users of Airflow who may approve and promote its versions, which then must ask "
        "(publish.approval); a line without an entry: whoever may answer and trigger in Airflow",
    )
    priorities: dict[LineName, Priority] = operational(
        {}, "by a line's name, 1 to 1000: Airflow starts the tasks of a higher number first; 1 for all others"
    )
    _origin: Path | None = PrivateAttr(None)

    def accept(self, config: LineConfig) -> LineConfig:
        """Return a line.

        Raises:
            UsageError: If it has approvers, and its runs would move production without asking them; or if it names a
                mirror that the file does not allow.
        """
        if self._origin is not None:
            self.mirrors_of(config)
        if config.line in self.approvers and not config.publish.approval and config.publish.promote_to == PRODUCTION:
            raise UsageError(
                f"{self._origin}: approvers of line {config.line}: its runs move production without asking; set "
                "publish.approval: true in the line"
            )
        return config

    def runtime_of(self, line: str) -> RuntimeConfig:
        """Return where the steps of a line run."""
        return self.lines.get(line, self.runtime)

    def notify_of(self, line: str) -> tuple[NotifyConfig, ...]:
        """Return who is told of a line's runs."""
        return tuple(entry for entry in self.notify if entry.line in ("*", line))

    def hooks_of(self, line: str) -> tuple[HookConfig, ...]:
        """Return the servers that load a line's models."""
        return tuple(entry for entry in self.hooks if entry.line in ("*", line))

    def mirrors_of(self, config: LineConfig) -> tuple[MirrorConfig, ...]:
        """Return the entries of the mirrors that a line names.

        Raises:
            UsageError: If one is not allowed, or its entry does not say where the line's runtime gets the token.
        """
        allowed = {entry.to: entry for entry in self.mirrors if entry.line in ("*", config.line)}
        place = self._origin or default_path()
        for uri in config.publish.mirror:
            if uri not in allowed:
                raise UsageError(
                    f"publish.mirror: {uri}: line {config.line} may have "
                    f"{', '.join(allowed) or 'no mirror'}, as {place} says; ask the owner of that file"
                )
            name = "secret" if self.runtime_of(config.line).kind == "kubernetes" else "connection"
            if getattr(allowed[uri], name) is None:
                raise UsageError(f"{place}: mirrors: {uri}: needs {name}, by which line {config.line} gets its token")
        return tuple(allowed[uri] for uri in config.publish.mirror)

    def priority_of(self, line: str) -> int:
        """Return the priority of a line's tasks."""
        return self.priorities.get(line, DEFAULT_PRIORITY)

    def access(self, root: str | None = None, own_folder: Path | None = None) -> SourceAccess:
        """Return what a line may read.

        Args:
            root: The store, whose own folders are no sources: the artifacts of every line are in them.
            own_folder: A further folder that may be read: the line's own, for its template.
        """
        if self.sources is None:
            return SourceAccess()
        own = (own_folder.as_uri(),) if own_folder else ()
        try:
            closed = [source_access.canonical(f"{root}/{name}") for name in uris.STORE_FOLDERS] if root else []
        except ValueError as error:
            raise UsageError(f"{root}: {error}") from error
        return SourceAccess((*self.sources, *own), tuple(closed), str(self._origin))

    def describe(self, line: str) -> str:
        """Return in a sentence or two what holds for a line, and where it is written."""
        runtime = self.runtime_of(line)
        settings = ", ".join(f"{name} {value}" for name, value in runtime.model_dump(exclude_unset=True).items())
        if line in self.priorities:
            settings = f"{settings or 'kind local'}, priority {self.priorities[line]}"
        if self._origin is None:
            return f"no {default_path()}: steps run as subprocesses, and sources may lie wherever this user may read"
        sources = (
            "wherever this user may read" if self.sources is None else f"below {', '.join(self.sources) or 'nothing'}"
        )
        approvers = f"; approvers: {', '.join(self.approvers[line])}" if line in self.approvers else ""
        return f"{self._origin}: steps run with {settings or 'kind local'}; sources may lie {sources}{approvers}"


def default_path() -> Path:
    """Return where the file is without `QLORA_RETRAIN_PLATFORM`."""
    return Path(__file__).resolve().parents[3] / "platform.yaml"


def load(lines_folder: Path | None = None) -> PlatformConfig:
    """Read the platform's settings.

    Args:
        lines_folder: The folder of the line that they are read for.

    Raises:
        UsageError: With every error of the file, or if it cannot be read or is in the folder of the line.
    """
    named = os.environ.get(PLATFORM_VARIABLE)
    path = Path(named) if named else default_path()
    # A link to nothing is no absent file: without its limits nothing must run.
    if not named and not os.path.lexists(path):
        return PlatformConfig()
    if lines_folder is not None and Path(os.path.realpath(path)).parent == Path(os.path.realpath(lines_folder)):
        raise UsageError(
            f"{path}: is in the folder of lines, whose authors could change it; move it to another folder, and set "
            f"{PLATFORM_VARIABLE} to its path"
        )
    platform = load_section(PlatformConfig, path)
    platform._origin = path
    return platform
