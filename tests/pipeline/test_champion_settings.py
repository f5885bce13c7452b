"""The split is a line's own: a version hands it on, and unchanged data keeps its key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.pipeline.champion_settings import champion_setting, resolve_split
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

OPENING = "0123456789abcdef"
LINE = DataConfig(split_seed="tickets")
# As a version of the release before this one has them.
OLDER = {"split_seed": "tickets", "eval_fraction": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def publish(
    store: Store, identity: dict[str, Any], numbers: dict[str, Any], dataset_key: str = "the champion's"
) -> Release:
    """A version in production with this recipe of its dataset."""
    recipe = json.dumps({"steps": {"validate_data": identity}}).encode()
    store.write_if_absent(f"{registry.version_folder('tickets', 'v1')}/recipe.json", recipe)
    return Release(
        line="tickets", version="v1", content_hash="c", created_at="20260131T000000Z", adapter_key="a", judgement="j",
        files=(File(path="recipe.json", size_bytes=len(recipe), sha256=hashlib.sha256(recipe).hexdigest()),),
        keys={"validate_data": "the champion's"}, base={}, numbers={"dataset": numbers}, provenance={},
    )  # fmt: skip


def resolved(store: Store, champion: Release | None, data: DataConfig = LINE, key: str = "new data") -> tuple[Any, Any]:
    settings, choices = resolve_split(store, champion, data, lambda _: key)
    assert {c.field.removeprefix("data.") for c in choices} == {
        name for name in ("min_eval_fraction", "shared_openings") if getattr(settings, name) != getattr(data, name)
        and getattr(settings, name)
    }  # fmt: skip
    return settings.min_eval_fraction, settings.shared_openings


def test_without_a_champion_the_data_decides(store: Store) -> None:
    assert resolved(store, None) == (None, None)


def test_new_data_is_split_as_the_champions_was(store: Store) -> None:
    champion = publish(store, LINE.identity(), {"eval_fraction": 0.37, "shared_openings": OPENING})
    assert resolved(store, champion) == (0.37, (OPENING,))
    # A champion without a shared opening says so, and later data gets none either.
    champion = champion.model_copy(update={"numbers": {"dataset": {"eval_fraction": 0.1, "shared_openings": ""}}})
    assert resolved(store, champion) == (0.1, ())


@pytest.mark.parametrize("own", [{}, {"min_eval_fraction": 0.2, "shared_openings": (OPENING,)}])
def test_unchanged_data_keeps_the_champions_key(store: Store, own: dict[str, Any]) -> None:
    recorded = LINE.model_copy(update=own)
    champion = publish(store, recorded.identity(), {"eval_fraction": 0.37, "shared_openings": OPENING})

    def key(data: DataConfig) -> str:
        return "the champion's" if data.identity() == recorded.identity() else "a new one"

    settings, _ = resolve_split(store, champion, LINE, key)
    assert settings.identity() == recorded.identity()


def test_another_split_seed_begins_anew(store: Store) -> None:
    champion = publish(store, LINE.identity(), {"eval_fraction": 0.37, "shared_openings": OPENING})
    assert resolved(store, champion, DataConfig(split_seed="other")) == (None, None)


def test_what_the_line_sets_itself_is_not_inherited(store: Store) -> None:
    champion = publish(store, LINE.identity(), {"eval_fraction": 0.37, "shared_openings": OPENING})
    assert resolved(store, champion, LINE.model_copy(update={"min_eval_fraction": 0.2, "shared_openings": ()})) == (
        0.2,
        (),
    )
    # A set fraction needs no lower bound.
    assert resolved(store, champion, LINE.model_copy(update={"eval_fraction": 0.2})) == (None, (OPENING,))


def test_a_version_of_the_release_before_was_split_by_its_set_fraction_and_without_openings(store: Store) -> None:
    assert resolved(store, publish(store, OLDER, {"rows_train": 300})) == (0.1, ())


def test_an_evaluation_file_hands_no_split_on(store: Store) -> None:
    champion = publish(store, LINE.identity(), {"eval_fraction": None, "shared_openings": None})
    assert resolved(store, champion) == (None, None)


def test_the_recipe_is_checked_by_its_hash(store: Store) -> None:
    champion = publish(store, LINE.identity(), {})
    assert champion_setting(store, champion, "validate_data", "split_seed") == "tickets"
    assert champion_setting(store, champion, "validate_data", "no_such_field") is None
    assert champion_setting(store, champion.model_copy(update={"files": ()}), "validate_data", "split_seed") is None

    path = f"{registry.version_folder('tickets', 'v1')}/recipe.json"
    store.delete([path])
    with pytest.raises(IntegrityError, match=r"recipe\.json: missing"):
        resolved(store, champion)
    store.write_if_absent(path, b"{}")
    with pytest.raises(IntegrityError, match=r"recipe\.json: its sha256 differs"):
        resolved(store, champion)
