"""A version that is an adapter alone can be compared with only where the run has its base."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline import base_of_version
from qlora_retrain.pipeline.planned_steps import PinnedVersion
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.pinned_source import PinnedFile, PinnedSource
from qlora_retrain.storage.registry import Release

PINS = {"model.safetensors": "sha256:" + "a" * 64, "config.json": "sha256:" + "b" * 64, "tokenizer.json": "sha256:1"}
COMMIT = {"*": "commit:" + "c" * 40}


def source(pins: dict[str, str]) -> PinnedSource:
    return PinnedSource(
        uri="file:///base", files=tuple(PinnedFile(path=p, size_bytes=1, pin=pin) for p, pin in pins.items())
    )


def publish(store: Any, pins: dict[str, str], file: str) -> PinnedVersion:
    """Complete a version of one file, without the file."""
    release = Release(
        line="tiny", version="20261101T000000Z-abc", content_hash="0" * 64, created_at="2026-11-01T00:00:00Z",
        files=(File(path=file, size_bytes=1, sha256="0" * 64),), adapter_key="k", judgement="j", keys={},
        base={"files": pins}, numbers={}, provenance={},
    )  # fmt: skip
    written = registry.complete_version(store, release)
    return PinnedVersion(version=written.version, manifest_sha256=written.sha256, content_hash=written.content_hash)


@pytest.mark.parametrize(
    ("needed", "actual", "message"),
    [
        (PINS, PINS, None),
        (PINS, {**PINS, "tokenizer.json": "sha256:2"}, None),
        (PINS, {**PINS, "model.safetensors": "sha256:" + "d" * 64}, "model.safetensors is another one"),
        (PINS, {**PINS, "config.json": "sha256:" + "d" * 64}, "config.json is another one"),
        # A commit that could not be listed is compared by itself.
        ({**COMMIT, **PINS}, COMMIT, None),
        (PINS, COMMIT, "they have no file in common"),
    ],
)
def test_the_base_is_compared_by_what_decides_its_numbers(
    root_uri: str, needed: dict[str, str], actual: dict[str, str], message: str | None
) -> None:
    store = open_store(root_uri)
    version = publish(store, needed, "model/base.json")
    if message is None:
        base_of_version.refuse_other_base(store, "tiny", version, source(actual))
    else:
        with pytest.raises(UsageError, match=f"is an adapter over another base model: {message}"):
            base_of_version.refuse_other_base(store, "tiny", version, source(actual))


def test_a_version_with_a_model_of_its_own_needs_no_base(root_uri: str) -> None:
    store = open_store(root_uri)
    version = publish(store, PINS, "model/model.safetensors")
    base_of_version.refuse_other_base(store, "tiny", version, source({**PINS, "config.json": "sha256:3"}))
