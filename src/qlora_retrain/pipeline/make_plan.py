"""Make a run's plan: resolve settings, pin sources, compute keys, then write it if the run has none.

Reads a line's YAML, its sources, the champion's manifest and this machine's hardware. Refuses (12) a config or a source
that cannot be used, and (13) a base model that could run code.

Command: `qlora-retrain plan CONFIG --root URI`
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from qlora_retrain.config import platform
from qlora_retrain.config.data import DataConfig
from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import graph, progress
from qlora_retrain.core.aliases import alias_of_run
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.pipeline import base_model, base_of_version, earlier_adapters, evaluation_history, explain, new_rows
from qlora_retrain.pipeline.auto_settings import Choice, resolve_auto_settings
from qlora_retrain.pipeline.champion_settings import resolve_split
from qlora_retrain.pipeline.evaluation_history import EvaluationHistory
from qlora_retrain.pipeline.plan import Plan, plan_path, run_id, utc_stamp
from qlora_retrain.pipeline.plan_hold import hold, write_plan
from qlora_retrain.pipeline.planned_steps import (
    PinnedAdapter,
    PinnedHistory,
    PinnedVersion,
    PlannedStep,
    describe_target,
    judgement_hash,
    plan_steps,
)
from qlora_retrain.pipeline.template_date import resolve_template_date
from qlora_retrain.storage import audit, key_admin, keys, open_store, registry, signatures, sources
from qlora_retrain.storage.sources import PinnedSource
from qlora_retrain.storage.store import AlreadyExists, Store

_PINNED_SOURCES = ("raw_data", "base_model", "golden_data", "replay_data", "eval_data", "reference_data")


def make_plan(
    line: Path | str,
    root: str,
    *,
    run: str | None = None,
    overrides: Sequence[str] = (),
    orchestrator: Sequence[str] = (),
    at: datetime | None = None,
    is_started_by_schedule: bool = False,
) -> Plan:
    """Make a run's plan, or return the plan that the run has already.

    Args:
        line: The line's YAML file, or the document itself.
        root: The store's URI.
        run: The run's id, where the orchestrator chose it; an existing plan of that run is returned unchanged.
        overrides: `section.field=value` strings.
        orchestrator: The run's ids in the orchestrator. The same ids of the same line find the same plan.
        at: The plan's time.
        is_started_by_schedule: Nobody asked for this run, so it must have new rows as the line's schedule says.

    Raises:
        UsageError: With every error of the config at once, or for a source or store that cannot be used.
        IntegrityError: For an unsafe base model.
    """
    at = at or datetime.now(UTC)
    store = open_store(root)
    # A run that is begun again keeps its plan, even where its line cannot be used any more.
    if run is not None and _has_plan(store, run):
        return _existing_plan(store, run, line, overrides)

    config = load(line, overrides)
    # KFP names a run by ids of its own, and calls this task again when it retries.
    if run is None and orchestrator:
        run = find_run(store, config.line, orchestrator)
        if run and _has_plan(store, run):
            return _existing_plan(store, run, line, overrides)

    # Without an id from outside, a person started the run on the command line; it gets a random one.
    run = run or _new_run_id(at, config.line, orchestrator)
    plan, history = draft_plan(config, store, run, at, is_started_by_schedule=is_started_by_schedule)
    plan = signatures.sign(store, plan_path(run), plan, keys.PLANNER)
    history.write(store, plan)
    try:
        write_plan(store, plan)
    except AlreadyExists:  # another try of the same task was faster, and its plan counts
        return find_plan(store, run)
    return plan


def draft_plan(
    config: LineConfig, store: Store, run: str, at: datetime, *, is_started_by_schedule: bool = False
) -> tuple[Plan, EvaluationHistory]:
    """Build a plan without writing it, and return the line's evaluation history with it.

    Raises:
        UsageError: For a source or a store that cannot be used.
        IntegrityError: For an unsafe base model.
    """
    key_admin.create_for_new_store(store, config.line)
    refuse_without_keys(store)
    store.probe()  # before gigabytes of sources are read
    history = evaluation_history.read(store, config.line, config.data.history_of)
    return build_plan(config, store, run, at, history, is_started_by_schedule), history


def refuse_without_keys(store: Store) -> None:
    """Refuse to plan without the keys of a store that has them, though no alias of the line says so.

    Raises:
        UsageError: If the newest plan is signed, and this process has no keys.
    """
    if keys.find_keyring(store.uri) is None and (newest := explain.newest_plan(store)):
        signatures.refuse_unverified(store, plan_path(newest.run_id), newest.signature)


def _has_plan(store: Store, run: str) -> bool:
    return "plan.json" in store.children(f"runs/{run}")


def _existing_plan(store: Store, run: str, line: Path | str, overrides: Sequence[str]) -> Plan:
    """Return the plan of a run that is begun again; say that it is kept, and what a new one would have otherwise.

    Raises:
        IntegrityError: If it is the plan of another line.
    """
    plan = find_plan(store, run)
    progress.say(f"run {plan.run_id} keeps its plan of {plan.created_at}")
    try:
        config = load(line, overrides)
    except UsageError as error:
        progress.say(f"the line cannot be used any more; this run goes on: {error}")
        return plan
    if plan.line != config.line:
        raise IntegrityError(f"run {plan.run_id}: has a plan of line {plan.line}; expected one of {config.line}")
    for change in explain.changes_since(plan, config):
        progress.say(f"changed since, and not used by this run: {change}")
    return plan


def find_plan(store: Store, run: str, *, only_look: bool = False) -> Plan:
    """Return the plan that a run of the store has already; let it count again, unless somebody only looks at it.

    Raises:
        UsageError: If the run has none.
        IntegrityError: If it is not the run's plan, or contradicts itself.
    """
    plan = Plan.of_run(store.uri, run)
    # It may have been made before the platform's settings.
    access = platform.load().access(store.uri)
    for source in filter(None, plan.sources.values()):
        sources.refuse_closed(source, access)
    if not only_look:
        hold(store, plan)
    return plan


def find_run(store: Store, line: str, orchestrator: Sequence[str]) -> str | None:
    """Return the run that an orchestrator's ids name, if there is one.

    The ids alone identify it, because a retry has another time stamp than the try that made the plan.
    """
    # A run's id is a time stamp, a hyphen and 12 hex digits of these ids: only the last 13 characters are compared.
    tail = _new_run_id(datetime.now(UTC), line, orchestrator)[-13:]
    return next((run for run in store.children("runs") if run.endswith(tail)), None)


def _new_run_id(at: datetime, line: str, orchestrator: Sequence[str]) -> str:
    return run_id(at, line, *(orchestrator or (uuid.uuid4().hex,)))


def build_plan(
    config: LineConfig, store: Store, run: str, at: datetime, history: EvaluationHistory, is_started_by_schedule: bool
) -> Plan:
    """Build the plan, and write nothing to the store."""
    access = platform.load().access(store.uri)
    pinned = {name: _pin(name, config, access) for name in _PINNED_SOURCES}
    versions, champion_release = _pin_versions(config, store)
    for version in (versions["champion"], versions["anchor"]):
        if version is not None:
            base_of_version.refuse_other_base(store, config.line, version, pinned["base_model"])
    if champion_release is not None:
        history.refuse_forgotten(store, config.line, champion_release.keys.get(graph.producer_name("dataset")))
    alias = alias_of_run(config.publish.promote_to, has_approval=config.publish.approval)
    target, _ = registry.read_alias(store, config.line, alias or registry.PRODUCTION)

    # The plan records what `auto` became, so that every pod of the run computes in the same way.
    settings, choices = resolve_auto_settings(config)
    if config.data.template_date == "auto":
        day, reason = resolve_template_date(config.data, pinned["base_model"], champion_release, at)
        settings["data"] = settings["data"].model_copy(update={"template_date": day})
        choices += (Choice(field="data.template_date", value=day, reason=reason),) if day else ()
    settings, further, pinned_history = _inherit_split(settings, store, pinned, versions, champion_release, history)
    choices += further
    base_model.refuse_unfit_source(settings, pinned["base_model"])
    alias_state = describe_target(target.version, target.generation) if target else None

    def steps_with(start: PinnedAdapter | None, *earlier: PinnedAdapter) -> tuple[PlannedStep, ...]:
        read_versions = {**versions, graph.START: start}
        return plan_steps(settings, pinned, read_versions, pinned_history, config.line, alias_state, earlier=earlier)

    start = earlier_adapters.choose_start(store, champion_release, settings, steps_with)
    earlier = earlier_adapters.choose_earlier(store, config.line, config.merge.soup, steps_with(start))
    steps = steps_with(start, *earlier)

    judgement = judgement_hash(steps)
    adapter_key = next(s.key for s in steps if s.name == graph.producer_name("adapter"))
    # Trained with the same data, settings and code, and judged by the same rules: a new run would only repeat it.
    is_unchanged = champion_release is not None and (
        (champion_release.adapter_key, champion_release.judgement) == (adapter_key, judgement)
    )
    return Plan(
        run_id=run,
        created_at=utc_stamp(at),
        root=store.uri,
        line=config.line,
        sources=pinned,
        champion=versions["champion"],
        anchor=versions["anchor"],
        reference=versions["reference_profile"],
        start=start,
        earlier_adapters=earlier,
        history=pinned_history,
        target=target.version if target else None,
        judgement=judgement,
        unchanged=champion_release.version if champion_release and is_unchanged else None,
        sequence=registry.next_sequence(store, config.line),
        min_new_rows=new_rows.resolve(config.schedule, champion_release, is_scheduled=is_started_by_schedule),
        choices=choices,
        steps=steps,
    )


def _pin(name: str, config: LineConfig, access: SourceAccess) -> PinnedSource | None:
    source = getattr(config.sources, name)
    return None if source is None else sources.pin(name, source.uri, source.files, access)


def _pin_versions(config: LineConfig, store: Store) -> tuple[dict[str, PinnedVersion | None], registry.Release | None]:
    """Return the published versions that steps read, by source, and the champion's release."""
    versions: dict[str, PinnedVersion | None] = dict.fromkeys(graph.VERSION_PARTS)
    if config.data.reference_version is not None:
        versions["reference_profile"] = _pin_version(store, config.line, config.data.reference_version)
    # The alias names the hash of the manifest, so a manifest that was exchanged is noticed.
    production, _ = registry.read_alias(store, config.line, registry.PRODUCTION)
    if production is None:
        return versions, None
    signatures.refuse_unverified(store, audit.alias_path(config.line, registry.PRODUCTION), production.signature)

    release = registry.read_release(store, config.line, production.version, sha256=production.manifest_sha256)
    versions["champion"] = PinnedVersion(
        version=release.version, manifest_sha256=production.manifest_sha256, content_hash=release.content_hash
    )
    # The champion's own manifest names the anchor, so a rollback brings back the anchor of that time. A best version
    # that was rolled back since is not used as an anchor.
    if release.anchor not in (None, release.version):
        best = _pin_version(store, config.line, release.anchor)
        versions["anchor"] = None if best.content_hash in production.rejected else best
    return versions, release


def _pin_version(store: Store, line: str, version: str) -> PinnedVersion:
    release = registry.read_release(store, line, version)
    return PinnedVersion(version=version, manifest_sha256=release.sha256, content_hash=release.content_hash)


def _inherit_split(
    settings: dict[str, Section],
    store: Store,
    pinned: Mapping[str, PinnedSource | None],
    versions: Mapping[str, PinnedVersion | None],
    champion: registry.Release | None,
    history: EvaluationHistory,
) -> tuple[dict[str, Section], tuple[Choice, ...], PinnedHistory | None]:
    """Return the settings with the split of the version in production, so that no row crosses it as data grows.

    And the evaluation history that the data set under these settings is made with.
    """

    def choose_history(data: DataConfig) -> tuple[PinnedHistory | None, str]:
        def dataset_key(candidate: PinnedHistory | None) -> str:
            steps = plan_steps({**settings, "data": data}, pinned, versions, candidate, "", None)
            return next(step.key for step in steps if step.name == graph.producer_name("dataset"))

        chosen_history = history.choose(dataset_key)
        return chosen_history, dataset_key(chosen_history)

    data = settings["data"]
    assert isinstance(data, DataConfig)
    data, choices = resolve_split(store, champion, data, lambda candidate: choose_history(candidate)[1])
    return {**settings, "data": data}, choices, choose_history(data)[0]
