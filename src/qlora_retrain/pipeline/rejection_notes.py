"""What a plan says of the versions that were rejected: by whom, why, and how this run differs from each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_retrain.core import graph, visible_text
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import version_diff
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, recipes, registry, rejections
from qlora_retrain.storage.registry import Rejection
from qlora_retrain.storage.store import Store

# The newest ones are what a person remembers; a line may have many.
_MAX_REJECTIONS = 3
_MAX_CHANGES = 6
# Whose settings and code determine a version. What the others measure only judges it.
_STEPS = tuple(graph.producer_name(artifact) for artifact in ("dataset", "base_nf4", "adapter", "model"))


def notes(plan: Plan) -> Iterator[str]:
    """Yield a sentence for the newest rejections of the alias that the run moves: one that holds for this run first."""
    store, alias = open_store(plan.root), _alias(plan)
    try:
        state, _ = registry.read_alias(store, plan.line, alias)
        rejected = rejections.of_alias(store, plan.line, alias, state)
    except IntegrityError as error:
        yield f"what was rejected cannot be read: {error}"
        return
    recipe = recipe_of(plan)
    # However old it is, the one of this recipe decides; beside newer ones alone the run would seem to be allowed.
    by_weight = sorted(rejected, key=lambda rejection: _has_recipe(rejection, recipe))
    for rejection in by_weight[::-1][:_MAX_REJECTIONS]:
        text = f"rejected for {alias}: {rejection.version}, by {rejections.describe(rejection)}"
        yield visible_text.escape_controls(f"{text}; {_comparison(store, plan, recipe, rejection)}".replace("\n", " "))


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Return the fields of a plan's recipe that determine the version, as `recipe.json` has them."""
    return {
        "steps": {step.name: step.identity for step in plan.steps},
        "inputs": {step.name: step.inputs for step in plan.steps},
        "code": {step.name: step.code for step in plan.steps},
        "sources": {
            name: {file.path: file.pin for file in source.files} if source else None
            for name, source in plan.sources.items()
        },
    }


def _alias(plan: Plan) -> str:
    """Return the alias whose rejections count: `production` also where a person decides on it."""
    return _promoted_alias(plan) or registry.PRODUCTION


def _promoted_alias(plan: Plan) -> str | None:
    alias: str | None = plan.step(graph.producer_name("release")).config.get("promote_to")
    return alias


def _has_recipe(rejection: Rejection, recipe: dict[str, Any]) -> bool:
    """Return whether a rejection holds for a recipe."""
    return rejection.recipe is not None and rejection.recipe == recipes.key_of(recipe)


def _comparison(store: Store, plan: Plan, recipe: dict[str, Any], rejection: Rejection) -> str:
    """Return how this run's recipe differs from that of a rejected version."""
    if _has_recipe(rejection, recipe) and _promoted_alias(plan) is None:
        return "this run has the same recipe, and promotes nothing (publish.promote_to is null)"
    if _has_recipe(rejection, recipe):
        return (
            "this run has the same recipe, so its version will not be promoted (11), whatever bytes training gives; "
            "change the data, the base model, or a setting of training or merging"
        )
    try:
        earlier = recipes.read(store, registry.read_release(store, plan.line, rejection.version))
    except (IntegrityError, UsageError):
        earlier = {}
    if not earlier:
        return "its recipe cannot be read any more, so nothing tells what differs"
    changes = version_diff.recipe_changes(earlier, recipe, _STEPS)
    if not changes:
        return "this run has the same recipe, but for versions that it starts from or averages with"
    texts = [f"{change.name}: {change.first} -> {change.second}" for change in changes[:_MAX_CHANGES]]
    remaining = f" and {len(changes) - _MAX_CHANGES} more" if len(changes) > _MAX_CHANGES else ""
    permission = "this run may be promoted, since it differs" if _promoted_alias(plan) else "this run differs"
    return f"{permission}: {'; '.join(texts)}{remaining}"
