"""Read what the version in production was made with, for settings that must not change within a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.pipeline.auto_settings import Choice
from qlora_retrain.storage import registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import NotFound, Store

_RECIPE = "recipe.json"


def champion_setting(store: Store, champion: Release, step: str, field: str) -> Any:
    """Return a setting of the run that published the champion; None where its recipe does not have the field.

    Raises:
        IntegrityError: If the version's recipe is missing or damaged.
    """
    return _identity(store, champion, step).get(field)


def resolve_split(
    store: Store, champion: Release | None, data: DataConfig, dataset_key: Callable[[DataConfig], str]
) -> tuple[DataConfig, tuple[Choice, ...]]:
    """Return the settings with the split that the line takes over from its champion, and the choices for the plan.

    A row that was evaluation must not be trained on, and a trained one must not be evaluation. So the fraction never
    shrinks within a line, and what counts as a shared opening stays what it was. Another `split_seed` begins anew.

    Args:
        store: The store.
        champion: The version in production, if there is one.
        data: The line's settings, with the split seed resolved.
        dataset_key: The key of the dataset under given settings.
    """
    if champion is None:
        return data, ()
    step = graph.producer_name("dataset")
    identity = _identity(store, champion, step)
    if identity.get("split_seed") != data.split_seed:
        return data, ()

    # With unchanged data the champion's own settings give its own dataset, so that nothing is made again.
    for values in (_own_settings(identity, data), _resolved_split(identity, champion, data)):
        settings = data.model_copy(update=values)
        if dataset_key(settings) == champion.keys.get(step):
            break
    return settings, _choices(values)


def _own_settings(identity: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """Return the champion's own settings of the split, for the fields that the line does not set itself."""
    fraction, openings = identity.get("min_eval_fraction"), identity.get("shared_openings")
    return _unset_fields(data, fraction, None if openings is None else tuple(openings))


def _resolved_split(identity: Mapping[str, Any], champion: Release, data: DataConfig) -> dict[str, Any]:
    """Return how the champion's data was split, for the fields that the line does not set itself."""
    numbers = champion.numbers.get("dataset", {})
    # Versions of older releases were split by a set fraction, and by the first turn of whatever chat.
    fraction = numbers.get("eval_fraction", identity.get("eval_fraction"))
    openings = numbers.get("shared_openings", "")
    return _unset_fields(
        data,
        fraction if isinstance(fraction, float) else None,
        tuple(openings.split()) if isinstance(openings, str) else None,
    )


def _unset_fields(data: DataConfig, fraction: float | None, openings: tuple[str, ...] | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if data.min_eval_fraction is None and data.eval_fraction == "auto":
        values["min_eval_fraction"] = fraction
    if data.shared_openings is None:
        values["shared_openings"] = openings
    return values


def _choices(values: Mapping[str, Any]) -> tuple[Choice, ...]:
    reason = "the split of the version in production, so that no row crosses it"
    texts = {
        name: " ".join(value) if isinstance(value, tuple) else str(value) for name, value in values.items() if value
    }
    return tuple(Choice(field=f"data.{name}", value=text, reason=reason) for name, text in texts.items())


def read_recipe(store: Store, release: Release) -> dict[str, Any]:
    """Return a version's recipe after checking the file's hash; empty where the version has none.

    Raises:
        IntegrityError: If the file is missing or is another one.
    """
    expected = next((file.sha256 for file in release.files if file.path == _RECIPE), None)
    if expected is None:
        return {}

    path = f"{registry.version_folder(release.line, release.version)}/{_RECIPE}"
    try:
        data = store.read(path).data
    except NotFound as error:
        raise IntegrityError(f"{store.uri}/{path}: missing; promote or roll back to another version") from error
    if hashing.sha256_bytes(data) != expected:
        raise IntegrityError(
            f"{store.uri}/{path}: its sha256 differs from the manifest's; promote or roll back to another version"
        )
    recipe: dict[str, Any] = json.loads(data)
    return recipe


def _identity(store: Store, champion: Release, step: str) -> dict[str, Any]:
    """Return the identity fields of a step in the champion's recipe."""
    steps: dict[str, dict[str, Any]] = read_recipe(store, champion).get("steps", {})
    return steps.get(step, {})
