"""The plan: the lock file of a run. Everything is resolved, pinned and addressed before any GPU is bought.

Reads a line's YAML, looks at the sources, the champion and this machine; writes `runs/<run_id>/plan.json` if absent.
Refuses (12) a config or a source that cannot be used, (13) a base model that could run code.

Command: `qlora-retrain plan CONFIG --root URI`
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import graph, hashing, uris
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import gguf_names
from qlora_retrain.pipeline import code_identity
from qlora_retrain.pipeline.auto_settings import Choice, resolved
from qlora_retrain.storage import open_store, registry, sources
from qlora_retrain.storage.sources import Pinned
from qlora_retrain.storage.store import Exists, NotFound, Store


class Champion(BaseModel):
    """A published version that the plan pins: what `production` named, the line's best, or `data.reference`."""

    model_config = ConfigDict(frozen=True)
    version: str
    manifest_sha256: str
    content_hash: str


class PlannedStep(BaseModel):
    """One step with everything that determines its artifact."""

    model_config = ConfigDict(frozen=True)
    name: str
    config: dict[str, Any]
    identity: dict[str, Any]
    inputs: dict[str, str | None]
    code: str
    key: str


class Plan(BaseModel):
    """A run's lock file.

    Attributes:
        champion: What `production` named when the plan was made.
        anchor: The line's best version so far; None where that is the champion, or there is none.
        reference: What `data.reference` names.
        target: What `publish.promote_to` named when the plan was made; it moves only if it still does.
        judgement: Hash of how evaluate, merge and publish judge, without whom they compare with.
        unchanged: The version in production that this very recipe made; then there is nothing to do.
        choices: What `auto` became, and why.
    """

    model_config = ConfigDict(frozen=True)
    schema_version: Literal[1] = 1
    run_id: str
    created_at: str
    root: str
    line: str
    sources: dict[str, Pinned | None]
    champion: Champion | None
    anchor: Champion | None = None
    reference: Champion | None = None
    target: str | None
    judgement: str
    unchanged: str | None
    choices: tuple[Choice, ...]
    steps: tuple[PlannedStep, ...]

    @property
    def uri(self) -> str:
        """Where this plan is kept."""
        return plan_uri(self.root, self.run_id)

    def pinned_version(self, source: str) -> Champion | None:
        """The version that a source of `graph.VERSIONS` is."""
        return {"champion": self.champion, "anchor": self.anchor, "reference_profile": self.reference}[source]

    @property
    def stamp(self) -> str:
        """The plan's UTC time, as versions begin: 20260131T235959Z."""
        return self.created_at

    def step(self, name: str) -> PlannedStep:
        """The planned step of that name."""
        return next(s for s in self.steps if s.name == name)

    @staticmethod
    def load(uri: str) -> Plan:
        """Read a plan.

        Raises:
            UsageError: If there is none at `uri`.
            IntegrityError: If it is not a plan, or names another place than the one it was read from.
        """
        parent, _, name = uris.absolute(uri).rpartition("/")
        try:
            data = open_store(parent).read(name).data
        except NotFound as error:
            raise UsageError(f"{uris.masked(uri)}: there is no plan here; make one with: qlora-retrain plan") from error
        try:
            plan = Plan.model_validate_json(data)
        except ValidationError as error:
            raise IntegrityError(f"{uris.masked(uri)}: is not a plan: {error.error_count()} faults") from error
        if plan.uri != f"{parent}/{name}":
            raise IntegrityError(f"{uris.masked(uri)}: says it is {plan.uri}; a plan cannot be moved")
        return plan


def run_id(at: datetime, *ids: str) -> str:
    """A run's name in the store: UTC stamp + 12 hex of the orchestrator's ids, never its own strings."""
    return f"{_stamp(at)}-{hashlib.sha256(hashing.canonical(list(ids))).hexdigest()[:12]}"


def plan_uri(root: str, run: str) -> str:
    """Where the plan of a run is kept."""
    return f"{root.rstrip('/')}/runs/{run}/plan.json"


def make(
    line: Path | str,
    root: str,
    *,
    run_id: str | None = None,
    overrides: Sequence[str] = (),
    orchestrator: Sequence[str] = (),
    at: datetime | None = None,
) -> Plan:
    """Make a run's plan, or return the one it has.

    Args:
        line: The line's YAML file, or the document itself.
        root: The store's URI.
        run_id: The run, where an orchestrator has named it; an existing plan of that run is kept as it is.
        overrides: `section.field=value` strings.
        orchestrator: The ids that name the run outside; the same ids of the same line find the same plan again.
        at: The plan's time.

    Raises:
        UsageError: For every fault of the config at once, or a source or store that cannot be used.
        IntegrityError: For an unsafe base model.
    """
    at = at or datetime.now(UTC)
    store = open_store(root)
    if run_id is not None:
        with contextlib.suppress(UsageError):  # none yet
            return Plan.load(plan_uri(store.uri, run_id))
    config = load(line, overrides)
    name = run_id
    if run_id is None and orchestrator:
        name = known_run(store, config.line, orchestrator)
        if name:
            with contextlib.suppress(UsageError):  # none yet
                return Plan.load(plan_uri(store.uri, name))
    name = name or _new_run_id(at, config.line, orchestrator)
    store.probe()  # before gigabytes of sources are read
    plan = _build(config, store, name, at)
    try:
        store.write_if_absent(f"runs/{name}/plan.json", plan.model_dump_json(indent=1).encode())
    except Exists:
        return Plan.load(plan.uri)
    return plan


def known_run(store: Store, line: str, orchestrator: Sequence[str]) -> str | None:
    """The run that an orchestrator's ids name, if there is one.

    The ids alone find it: a retry comes at another second than the try that made the plan.
    """
    tail = _new_run_id(datetime.now(UTC), line, orchestrator)[-13:]
    return next((known for known in store.children("runs") if known.endswith(tail)), None)


def _new_run_id(at: datetime, line: str, orchestrator: Sequence[str]) -> str:
    import uuid

    return run_id(at, line, *(orchestrator or (uuid.uuid4().hex,)))


def _stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def _build(config: LineConfig, store: Store, name: str, at: datetime) -> Plan:
    pinned: dict[str, Pinned | None] = {
        "raw_data": _pin("raw_data", config),
        "base_model": _pin("base_model", config),
        "golden_data": _pin("golden_data", config),
        "reference_data": _pin("reference_data", config),
    }
    _refuse_exports(config, pinned["base_model"])
    champion_alias, _ = registry.alias(store, config.line, registry.PRODUCTION)
    release = None
    versions: dict[str, Champion | None] = dict.fromkeys(graph.VERSIONS)
    if champion_alias is not None:
        release = registry.read_release(
            store, config.line, champion_alias.version, sha256=champion_alias.manifest_sha256
        )
        versions["champion"] = Champion(
            version=release.version, manifest_sha256=champion_alias.manifest_sha256, content_hash=release.content_hash
        )
        # The champion's own manifest names it, so a rollback brings back the anchor of that time. A best version that
        # was rejected since holds nobody to its mark.
        if release.anchor not in (None, release.version):
            best = _version(store, config.line, release.anchor)
            versions["anchor"] = None if best.content_hash in champion_alias.rejected else best
    if config.data.reference is not None:
        versions["reference_profile"] = _version(store, config.line, config.data.reference)
    target, _ = registry.alias(store, config.line, config.publish.promote_to or registry.PRODUCTION)
    settings, choices = resolved(config)
    steps = _planned(settings, pinned, versions, target)
    judgement = _judgement(steps)
    adapter_key = next(s.key for s in steps if s.name == "train_qlora")
    unchanged = release is not None and (release.adapter_key, release.judgement) == (adapter_key, judgement)
    return Plan(
        run_id=name,
        created_at=_stamp(at),
        root=store.uri,
        line=config.line,
        sources=pinned,
        champion=versions["champion"],
        anchor=versions["anchor"],
        reference=versions["reference_profile"],
        target=target.version if target else None,
        judgement=judgement,
        unchanged=release.version if release and unchanged else None,
        choices=choices,
        steps=steps,
    )


def _version(store: Store, line: str, version: str) -> Champion:
    release = registry.read_release(store, line, version)
    return Champion(
        version=version,
        manifest_sha256=registry.manifest_sha256(store, line, version),
        content_hash=release.content_hash,
    )


def _pin(name: str, config: LineConfig) -> Pinned | None:
    source = getattr(config.sources, name)
    return None if source is None else sources.pin(name, source.uri, source.files)


def _refuse_exports(config: LineConfig, base: Pinned | None) -> None:
    """Refuse forms that the base has no name for: the step that makes them comes after hours of training."""
    if base is not None and any(name.startswith("gguf") for name in config.merge.exports):
        gguf_names.refuse(sources.documents(base, gguf_names.FILES))


def _planned(
    settings: Mapping[str, Section],
    pinned: Mapping[str, Pinned | None],
    versions: Mapping[str, Champion | None],
    target: registry.Alias | None,
) -> tuple[PlannedStep, ...]:
    made: dict[str, str] = {}
    planned = []
    for step in graph.STEPS:
        inputs: dict[str, str | None] = {}
        for item in step.reads:
            source = pinned.get(item.name)
            if item.name in versions:  # its manifest's hash covers its model and its data profile
                version = versions[item.name]
                inputs[item.name] = version.manifest_sha256 if version else None
            elif graph.maker(item.name):
                inputs[item.name] = made[item.name]
            else:
                inputs[item.name] = source.subset(item.only).key() if source else None
        if step.store:  # it acts on the alias: once that has moved, what it did before does not count as done
            inputs["target"] = f"{target.version} of generation {target.generation}" if target else None
        section = settings[step.section]
        identity = section.identity()
        code_id = code_identity.identity(step.name)
        key = hashing.step_key(step.name, identity, inputs, code_id)
        made[step.makes] = key
        planned.append(
            PlannedStep(
                name=step.name,
                config=section.model_dump(mode="json"),
                identity=identity,
                inputs=inputs,
                code=code_id,
                key=key,
            )
        )
    return tuple(planned)


def _judgement(steps: Sequence[PlannedStep]) -> str:
    """How a challenger is judged and published, apart from the champion and from what was trained."""
    judging = {}
    for step in steps:
        if step.name in ("evaluate", "merge_adapter", "publish"):
            apart = {n: k for n, k in step.inputs.items() if n in ("golden_data", "reference_data")}
            judging[step.name] = {"config": step.identity, "code": step.code, "inputs": apart}
    return hashing.digest(judging)
