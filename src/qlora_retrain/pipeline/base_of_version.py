"""Refuse a run that cannot load the version that it is judged against: an adapter alone, over another base."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline.planned_steps import PinnedVersion
from qlora_retrain.storage import registry
from qlora_retrain.storage.pinned_source import PinnedSource
from qlora_retrain.storage.store import Store


def refuse_other_base(store: Store, line: str, version: PinnedVersion, base: PinnedSource | None) -> None:
    """Compare the base that a version needs with the run's; one that has a model of its own needs none.

    Raises:
        UsageError: If they differ.
    """
    release = registry.read_release(store, line, version.version, sha256=version.manifest_sha256)
    if base is None or not release.is_adapter_alone:
        return
    needed = _deciding(release.base["files"].items())
    actual = _deciding((file.path, file.pin) for file in base.files)
    # Of a commit that could not be listed only the commit is known, on either side.
    common = needed.keys() & actual.keys()
    different = sorted(path for path in common if needed[path] != actual[path])
    if different or not common:
        reason = f"{different[0]} is another one" if different else "they have no file in common"
        raise UsageError(
            f"sources.base_model: {line} {version.version}, with which the run compares its model, is an adapter over "
            f"another base model: {reason}. Set sources.base_model to that base, promote a version that has a model of "
            "its own, or begin a new line"
        )


def _deciding(pins: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the pins of the files that decide what a base computes; a commit stands for all of its files."""
    return {
        path: pin
        for path, pin in pins
        if path.endswith(".safetensors") or path == "config.json" or pin.startswith("commit:")
    }
