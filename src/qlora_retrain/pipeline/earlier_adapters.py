"""Choose the adapters of earlier versions that a run reads: what training starts from, and what is averaged.

An adapter of a version is what ships in its `adapter/`: the form that was merged into the model in production. What was
trained may have another rank or strength, and its artifact may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qlora_retrain.config.fields import Section
from qlora_retrain.config.methods import METHODS
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline.champion_settings import read_recipe
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.pipeline.planned_steps import PinnedAdapter, PlannedStep
from qlora_retrain.storage import registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

# A line may have thousands of versions, of which few are over the base of today.
_MAX_VERSIONS_READ = 100
_CONFIG_FILE = f"{graph.ADAPTER_PART}/adapter_config.json"
Steps = Sequence[PlannedStep]
Recipe = Mapping[str, Any]


def choose_start(
    store: Store,
    champion: Release | None,
    settings: Mapping[str, Section],
    steps_with: Callable[[PinnedAdapter | None], Steps],
) -> PinnedAdapter | None:
    """Return the version whose adapter training starts from; None: a new adapter.

    Data, settings and base with which the champion itself was made give its own start, so that nothing is made again.

    Args:
        store: The store.
        champion: The version in production, if there is one.
        settings: The sections of the line, by name.
        steps_with: Returns the planned steps with a given start.

    Raises:
        UsageError: If training cannot go on from the champion's adapter.
        IntegrityError: If the champion's recipe is damaged.
    """
    train = settings[_step_of("adapter").section]
    assert isinstance(train, TrainConfig)
    if train.start == "base" or champion is None:
        return None

    recipe = read_recipe(store, champion)
    own_start = PinnedAdapter.model_validate(recipe["start"]) if recipe.get("start") else None
    if _key(steps_with(own_start), "adapter") == champion.adapter_key:
        return own_start
    start = _pin(champion, *graph.VERSION_PARTS[graph.START])
    if fault := _start_fault(champion, recipe, train, steps_with(start)):
        raise UsageError(
            f"train.start: champion cannot go on from {champion.version}, the version in production: {fault}, or "
            "train.start: base"
        )
    return start


def choose_earlier(store: Store, line: str, soup: int | None, steps: Steps) -> tuple[PinnedAdapter, ...]:
    """Return the versions whose adapters are averaged with this run's, the newest first.

    They are the last accepted ones over the same base and layers: published, and rejected by no rollback since. Each
    adapter counts once, and this run's own is none of them.

    Args:
        store: The store.
        line: The line.
        soup: How many adapters are averaged, with this run's; None: this run's alone.
        steps: The planned steps.

    Raises:
        IntegrityError: If an alias or a version's recipe is damaged.
    """
    if soup is None:
        return ()
    pins: dict[str, PinnedAdapter] = {}
    alias = _planned(steps, "release").identity["promote_to"]
    for release in _accepted(store, line, *([alias] if alias else [])):
        if len(pins) == soup - 1:
            break
        if release.adapter_key != _key(steps, "adapter") and _joins(read_recipe(store, release), steps):
            pin = _pin(release, graph.ADAPTER_PART)
            pins.setdefault(pin.adapter_hash, pin)
    return tuple(pins.values())


def describe(plan: Plan) -> Iterator[str]:
    """Yield what training starts from and what is averaged, each in a sentence, where the line sets it."""
    train, merge = (plan.step(graph.producer_name(artifact)).identity for artifact in ("adapter", "model"))
    if train["start"] == "champion":
        yield f"start: {_describe_start(plan)} (train.start: champion)"
    if merge["soup"] is not None:
        names = ", ".join(adapter.version for adapter in plan.earlier_adapters)
        few = "; the line has no more that fit" if len(plan.earlier_adapters) < merge["soup"] - 1 else ""
        text = f"this run's adapter with those of {names}{few}" if names else "none: the line has no version that fits"
        yield f"soup: {text} (merge.soup: {merge['soup']})"


def _describe_start(plan: Plan) -> str:
    if plan.champion is None:
        return "a new adapter over the base, since the line has no version in production yet"
    if plan.start is None:
        return "a new adapter over the base, as that of the version in production had, of the same data and settings"
    if plan.start.version == plan.champion.version:
        return f"the adapter of {plan.start.version}, the version in production"
    return (
        f"the adapter of {plan.start.version}, as that of the version in production had, of the same data and settings"
    )


def _accepted(store: Store, line: str, *further: str) -> Iterator[Release]:
    """Yield the versions that were published and that no rollback of these aliases rejected, the newest first."""
    aliases = [registry.read_alias(store, line, name)[0] for name in dict.fromkeys((registry.PRODUCTION, *further))]
    rejected = {content for alias in aliases if alias for content in alias.rejected}
    names = sorted(store.children(f"models/{line}/versions"), reverse=True)
    for name in names[:_MAX_VERSIONS_READ]:
        try:
            release = registry.read_release(store, line, name)
        except (UsageError, IntegrityError):
            continue  # an attempt that died before it wrote its manifest, or what somebody else put there
        has_adapter = any(file.path == _CONFIG_FILE for file in release.files)  # publish.parts may leave it out
        if release.content_hash not in rejected and has_adapter:
            yield release


def _joins(recipe: Recipe, steps: Steps) -> bool:
    """Return whether an adapter can be averaged with this run's: B A over the same base, in the same layers."""
    train = _identity(recipe, "adapter")
    facts = METHODS.get(train.get("method", ""))
    return (
        facts is not None
        and facts.joins == "yes"
        and _base(recipe) == _planned_base(steps)
        and train.get("target_modules") == _planned(steps, "adapter").identity["target_modules"]
    )


def _start_fault(champion: Release, recipe: Recipe, train: TrainConfig, steps: Steps) -> str | None:
    """Return why training cannot go on from the champion's adapter, and what to set; None where it can."""
    earlier = _identity(recipe, "adapter")
    if "adapter" not in _identity(recipe, "release").get("parts", ["adapter"]):
        return "it was published without its adapter (publish.parts); promote a version that has one"
    if earlier.get("method") != train.method or not any(file.path == _CONFIG_FILE for file in champion.files):
        return f"it was trained with another method; set train.method: {earlier.get('method')}"
    if _base(recipe)[0] != _planned_base(steps)[0]:
        return "it was trained over another base model; set sources.base_model to that one"
    if _base(recipe) != _planned_base(steps):
        return f"its base was stored in another format; set quantize.format: {_base(recipe)[1]}"
    if earlier.get("target_modules") != train.target_modules:
        return f"its adapter is in other layers; set train.target_modules: {earlier.get('target_modules')}"
    # A smaller rank gets new ranks beside it. A larger one would have to be cut, and would not be production any more.
    rank, ranks = _shipped_rank(champion, earlier), [train.rank, *train.rank_pattern.values()]
    if rank > max(ranks):
        return f"its adapter has rank {rank}, and train.rank is {train.rank}; set train.rank: {rank} or more"
    return _split_fault(champion, recipe, _planned(steps, "dataset").identity)


def _split_fault(champion: Release, recipe: Recipe, data: Mapping[str, Any]) -> str | None:
    """Return why rows that the champion has learnt may be evaluation now, and what to set; None where none can."""
    seed = _identity(recipe, "dataset").get("split_seed")
    if seed != data["split_seed"]:
        return f"another split would evaluate rows that it has learnt; set data.split_seed: {seed}"
    fraction = champion.numbers.get("dataset", {}).get("eval_fraction")
    if isinstance(fraction, float) and isinstance(data["eval_fraction"], float) and data["eval_fraction"] > fraction:
        return f"a larger evaluation would have rows that it has learnt; set data.eval_fraction: {fraction:g} or less"
    return None


def _shipped_rank(release: Release, identity: Mapping[str, Any]) -> int:
    """Return the rank of the adapter that a version holds."""
    # Older merges do not state it: they shipped what was trained.
    rank = release.numbers.get("model", {}).get("rank")
    return int(rank if rank is not None else identity.get("rank", 0))


def _pin(release: Release, *parts: str) -> PinnedAdapter:
    return PinnedAdapter(
        version=release.version,
        manifest_sha256=release.sha256,
        content_hash=release.content_hash,
        adapter_hash=_hash(release.parts(*parts)),
    )


def _hash(files: Sequence[File]) -> str:
    return hashing.content_hash((file.path, file.sha256) for file in files)


def _base(recipe: Recipe) -> tuple[str | None, str | None]:
    """Return the key of the base model that a version was trained over, and the format of its weights."""
    inputs = recipe.get("inputs", {}).get(graph.producer_name("base_nf4"), {})
    return inputs.get("base_model"), _identity(recipe, "base_nf4").get("format")


def _planned_base(steps: Steps) -> tuple[str | None, str | None]:
    planned = _planned(steps, "base_nf4")
    return planned.inputs["base_model"], planned.identity["format"]


def _identity(recipe: Recipe, artifact: str) -> Mapping[str, Any]:
    identity: Mapping[str, Any] = recipe.get("steps", {}).get(graph.producer_name(artifact), {})
    return identity


def _step_of(artifact: str) -> graph.Step:
    return graph.step(graph.producer_name(artifact))


def _planned(steps: Steps, artifact: str) -> PlannedStep:
    return next(step for step in steps if step.name == graph.producer_name(artifact))


def _key(steps: Steps, artifact: str) -> str:
    return _planned(steps, artifact).key
