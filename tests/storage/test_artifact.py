"""Artifacts: folders that exist once their manifest does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.store import Store

KEY, OTHER_KEY = "a" * 64, "b" * 64


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


def write_files(folder: Path, text: str = "one") -> Path:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text("two")
    return folder


def describe(folder: Path, name: str = "dataset", key: str = KEY, **inputs: str) -> Manifest:
    return Manifest(
        artifact=name,
        key=key,
        step="validate_data",
        attempt=artifact.new_attempt_id(),
        outcome="done",
        exit_code=0,
        numbers={"rows": 3},
        files=artifact.list_files(folder),
        inputs=dict(inputs),
        config={},
        code="c",
        provenance={},
    )


def complete(store: Store, folder: Path, name: str = "dataset", key: str = KEY, **inputs: str) -> Manifest:
    return artifact.complete(store, write_files(folder), describe(folder, name, key, **inputs))


def stored_paths(store: Store) -> set[str]:
    return {e.path for e in store.list("artifacts")}


def test_files_are_listed_with_their_hashes(tmp_path: Path) -> None:
    files = artifact.list_files(write_files(tmp_path / "x"))
    assert [(f.path, f.size_bytes) for f in files] == [("a.txt", 3), ("sub/b.txt", 3)]
    assert files[0].sha256 == hashlib.sha256(b"one").hexdigest()


def test_a_completed_artifact_is_found_as_it_was_describe(store: Store, tmp_path: Path) -> None:
    assert artifact.find_manifest(store, "dataset", KEY) is None
    manifest = complete(store, tmp_path / "x")
    assert artifact.find_manifest(store, "dataset", KEY) == manifest
    assert stored_paths(store) == {
        f"artifacts/dataset/{KEY}/_manifest.json",
        f"{manifest.prefix}/a.txt",
        f"{manifest.prefix}/sub/b.txt",
    }
    artifact.check_files(store, manifest)


def test_without_its_manifest_there_is_no_artifact(store: Store, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x")
    manifest = describe(folder)
    # The process died here: its files are in the store, and no manifest names them.
    store.upload(folder, manifest.prefix, ["a.txt", "sub/b.txt"])
    assert artifact.find_manifest(store, "dataset", KEY) is None
    second = artifact.complete(store, folder, describe(folder))
    assert artifact.find_manifest(store, "dataset", KEY) == second


def test_the_loser_of_a_race_ends_as_the_winner_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    winner = complete(store, tmp_path / "x")
    folder = write_files(tmp_path / "y", text="other bytes")
    loser = describe(folder)
    assert artifact.complete(store, folder, loser) == winner
    assert not list(store.list(loser.prefix))
    artifact.check_files(store, winner)


def test_the_loser_is_told_when_the_winner_is_broken(store: Store, tmp_path: Path) -> None:
    winner = complete(store, tmp_path / "x")
    store.delete([f"{winner.prefix}/a.txt"])
    with pytest.raises(IntegrityError, match=f"a.txt.*qlora-retrain drop dataset {KEY} --root {store.uri}"):
        complete(store, tmp_path / "y")


def test_a_damaged_manifest_names_the_drop_command(store: Store, tmp_path: Path) -> None:
    store.write_if_absent(artifact.manifest_path("dataset", KEY), b"{}")
    with pytest.raises(IntegrityError, match=f"not a manifest.*qlora-retrain drop dataset {KEY}"):
        artifact.find_manifest(store, "dataset", KEY)


def test_a_manifest_of_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    manifest = complete(store, tmp_path / "x")
    store.write_if_absent(artifact.manifest_path("dataset", OTHER_KEY), manifest.model_dump_json().encode())
    with pytest.raises(IntegrityError, match=f"names dataset/{KEY}"):
        artifact.find_manifest(store, "dataset", OTHER_KEY)


@pytest.mark.parametrize("fault", ["missing", "short"])
def test_a_file_that_is_not_as_promised_is_found_without_reading_it(store: Store, tmp_path: Path, fault: str) -> None:
    manifest = complete(store, tmp_path / "x")
    path = tmp_path / "store" / manifest.prefix / "sub" / "b.txt"
    if fault == "missing":
        path.unlink()
    else:
        path.write_text("tw")

    with pytest.raises(IntegrityError, match=r"sub/b\.txt: expected 3 bytes, found (missing|2 bytes)"):
        artifact.check_files(store, manifest)


def test_a_drop_removes_the_artifact_and_everything_made_from_it(store: Store, tmp_path: Path) -> None:
    complete(store, tmp_path / "1", "dataset", KEY)
    complete(store, tmp_path / "2", "adapter", KEY, dataset=KEY, base_nf4=KEY)
    complete(store, tmp_path / "3", "evaluation", KEY, dataset=KEY, adapter=KEY)
    complete(store, tmp_path / "4", "adapter", OTHER_KEY, dataset=OTHER_KEY)
    unrelated = complete(store, tmp_path / "5", "base_nf4", KEY)

    assert set(artifact.drop(store, "dataset", KEY)) == {f"{n}/{KEY}" for n in ("dataset", "adapter", "evaluation")}
    assert {p.split("/")[1] for p in stored_paths(store)} == {"adapter", "base_nf4"}
    assert artifact.find_manifest(store, "adapter", OTHER_KEY) is not None
    assert artifact.find_manifest(store, "base_nf4", KEY) == unrelated
    assert artifact.drop(store, "dataset", KEY) == []


def test_a_drop_removes_the_manifest_before_the_files(store: Store, tmp_path: Path) -> None:
    complete(store, tmp_path / "x")
    order: list[str] = []

    # Whoever looks while a drop is under way must find no artifact, not one with missing files.
    class RecordingStore:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def delete(self, paths: Iterable[str]) -> None:
            paths = list(paths)
            order.extend(paths)
            store.delete(paths)

    artifact.drop(RecordingStore(), "dataset", KEY)  # type: ignore[arg-type]
    assert order[0].endswith("_manifest.json")
    assert len(order) == 3
    assert stored_paths(store) == set()


@pytest.mark.parametrize(
    ("name", "key"), [("dataset", "abc"), ("dataset", f"{KEY}/x"), ("..", KEY), ("raw_data", KEY), ("", "")]
)
def test_only_an_artifact_and_a_whole_key_can_be_dropped(store: Store, name: str, key: str) -> None:
    with pytest.raises(UsageError, match="expected one of dataset"):
        artifact.drop(store, name, key)


def test_a_winner_that_was_dropped_at_once_means_try_again(store: Store, tmp_path: Path) -> None:
    winner = complete(store, tmp_path / "x")

    # Another person drops the winner after our manifest was refused and before we look at theirs.
    class DroppingStore:
        uri = store.uri

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def delete(self, paths: Iterable[str]) -> None:
            store.delete([*paths, artifact.manifest_path(winner.artifact, winner.key)])

    folder = write_files(tmp_path / "y")
    with pytest.raises(TryAgain, match="run again"):
        artifact.complete(DroppingStore(), folder, describe(folder))  # type: ignore[arg-type]
