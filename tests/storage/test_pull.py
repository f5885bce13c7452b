"""A consumer gets exactly what was published, or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, keys, open_store, pull, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

REFERENCE = "intents@production"


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def publish(line: Path, root_uri: str, run_all: Callable[[Plan], dict[str, int]]) -> Callable[[str], Release]:
    """Publish a version that was trained on this text."""

    def run(text: str) -> Release:
        (line.parent / "tickets.jsonl").write_text(text)
        plan = make_plan.make_plan(line, root_uri)
        assert set(run_all(plan).values()) == {0}
        alias, _ = registry.read_alias(open_store(root_uri), "intents", "production")
        assert alias is not None
        return registry.read_release(open_store(root_uri), "intents", alias.version)

    return run


def files(folder: Path) -> dict[str, bytes]:
    if (folder / "current").exists():
        folder = (folder / "current").resolve()
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def inode_times(folder: Path) -> dict[str, int]:
    folder = (folder / "current").resolve()
    return {p.as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != pull.RECORD}


@pytest.mark.parametrize("by", ["alias", "version"])
def test_a_pull_gives_every_file_as_it_was_published(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, by: str
) -> None:
    release = publish("one")
    reference = REFERENCE if by == "alias" else f"intents@{release.version}"
    assert pull.pull(store, reference, tmp_path / "new" / "dest") == release

    pulled = files(tmp_path / "new" / "dest")
    assert json.loads(pulled.pop(pull.RECORD))["version"] == release.version
    assert json.loads(pulled.pop("manifest.json"))["content_hash"] == release.content_hash

    folder = tmp_path / "store" / registry.version_folder("intents", release.version)
    published = files(folder)
    del published["manifest.json"]

    assert pulled == published
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["dest"]


def test_a_second_pull_of_the_same_copies_nothing(
    store: Store, publish: Callable[[str], Release], tmp_path: Path
) -> None:
    publish("one")
    pull.pull(store, REFERENCE, tmp_path / "dest")
    before = inode_times(tmp_path / "dest")
    pull.pull(store, REFERENCE, tmp_path / "dest")
    assert inode_times(tmp_path / "dest") == before


def test_a_newer_version_replaces_the_one_before(
    store: Store, publish: Callable[[str], Release], tmp_path: Path
) -> None:
    publish("one")
    pull.pull(store, REFERENCE, tmp_path / "dest")
    new = publish("two")
    assert pull.pull(store, REFERENCE, tmp_path / "dest") == new
    assert set(files(tmp_path / "dest")) == {f.path for f in new.files} | {pull.RECORD, "manifest.json"}
    assert not list(tmp_path.glob(".dest*"))


def test_a_pulled_file_that_was_changed_is_pulled_again(
    store: Store, publish: Callable[[str], Release], tmp_path: Path
) -> None:
    publish("one")
    pull.pull(store, REFERENCE, tmp_path / "dest")
    path = tmp_path / "dest" / "model" / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[::-1])
    pull.pull(store, REFERENCE, tmp_path / "dest")
    assert path.read_bytes() == good


@pytest.mark.parametrize("fault", ["flipped", "missing", "manifest"])
def test_a_byte_that_is_not_as_published_leaves_nothing_at_the_destination(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, fault: str
) -> None:
    release = publish("one")
    folder = tmp_path / "store" / registry.version_folder("intents", release.version)
    path = folder / ("manifest.json" if fault == "manifest" else "model/model.safetensors")
    data = path.read_bytes()
    # Removed before it is written: it may be a hard link to the artifact's file.
    path.unlink()
    if fault != "missing":
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])

    with pytest.raises(IntegrityError) as caught:
        pull.pull(store, REFERENCE, tmp_path / "dest")
    assert path.name in str(caught.value)
    assert not (tmp_path / "dest").exists()
    assert not list(tmp_path.glob(".dest*"))


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("model/modeling.py", b"import os"),
        ("adapter/optimizer.pt", b"a pickle"),
        ("setup.sh", b"rm"),
        ("model/.hidden.json", b"{}"),
        ("model/config.json", b'{"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}'),
        ("adapter/adapter_config.json", b'{"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}'),
        ("model/tokenizer_config.json", b"[" * 10**5),
    ],
)
def test_a_version_that_somebody_else_wrote_is_refused_though_every_hash_is_right(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, path: str, data: bytes
) -> None:
    good = publish("one")
    source, name = registry.version_folder("intents", good.version), "20990101T000000Z-0123456789ab"
    folder = registry.version_folder("intents", name)
    store.copy([(f"{source}/{file.path}", f"{folder}/{file.path}") for file in good.files])
    (tmp_path / "up" / path).parent.mkdir(parents=True)
    (tmp_path / "up" / path).write_bytes(data)
    store.upload(tmp_path / "up", folder, [path])
    forged_files = (*(file for file in good.files if file.path != path), *artifact.list_files(tmp_path / "up"))
    content = hashing.content_hash(
        (f.path, f.sha256) for f in forged_files if f.path.startswith(("adapter/", "model/"))
    )
    forged = registry.complete_version(
        store, good.model_copy(update={"version": name, "content_hash": content, "files": forged_files})
    )

    # As an attacker who may write the alias does; no check of ours is asked.
    registry.move_alias(store, "intents", "production", forged, reason="a forgery", is_verified=True)
    with pytest.raises(IntegrityError, match=r"no file that this project writes|would run code|levels deep"):
        pull.pull(store, REFERENCE, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    assert not list(tmp_path.glob(".dest*"))
    # By hand it is not promoted either.
    with pytest.raises(IntegrityError, match=r"no file that this project writes|would run code|levels deep"):
        registry.move_alias(store, "intents", "staging", forged, reason="by hand")


def test_a_store_that_went_back_in_time_is_refused(
    store: Store, publish: Callable[[str], Release], tmp_path: Path
) -> None:
    old = publish("one")
    shutil.copytree(tmp_path / "store", tmp_path / "backup")
    new = publish("two")
    dest = tmp_path / "dest"
    pull.pull(store, REFERENCE, dest)
    before = files(dest)
    backup = open_store((tmp_path / "backup").as_uri())

    with pytest.raises(IntegrityError, match=r"generation 1 .* does not follow generation 2"):
        pull.pull(backup, REFERENCE, dest)
    assert files(dest) == before

    # An old version that is asked for by its name is no fault.
    pull.pull(backup, f"intents@{old.version}", dest)
    # The newest generation is still remembered after that.
    with pytest.raises(IntegrityError, match="does not follow"):
        pull.pull(backup, REFERENCE, dest)
    assert pull.pull(store, REFERENCE, dest) == new


def test_one_generation_with_two_versions_is_refused(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("one")
    shutil.copytree(tmp_path / "store", tmp_path / "twin")
    second = publish("two")
    # A copy of the store that went on by itself: both have a generation 2, with different versions.
    twin = open_store((tmp_path / "twin").as_uri())
    shutil.copytree(keys.keys_folder(store.uri), tmp_path / "keys")
    trust = tmp_path / "keys" / keys.TRUST_FILE
    trust.write_text(trust.read_text().replace(store.uri, twin.uri))
    third = second.model_copy(update={"version": "20990101T000000Z-x"})
    folder = registry.version_folder("intents", second.version)
    shutil.copytree(tmp_path / "store" / folder, tmp_path / "twin" / folder.replace(second.version, third.version))
    (tmp_path / "twin" / folder.replace(second.version, third.version) / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setenv(keys.KEYS_VARIABLE, str(tmp_path / "keys"))
        third = registry.complete_version(twin, third)
        registry.move_alias(twin, "intents", "production", third, reason="a split brain")
    pull.pull(store, REFERENCE, tmp_path / "dest")

    with pytest.raises(IntegrityError, match="does not follow generation 2"):
        pull.pull(twin, REFERENCE, tmp_path / "dest")


def test_a_rollback_is_a_move_forward_for_the_consumer(
    store: Store, publish: Callable[[str], Release], tmp_path: Path
) -> None:
    first = publish("one")
    publish("two")
    pull.pull(store, REFERENCE, tmp_path / "dest")
    registry.rollback(store, "intents", "production", reason="bad")
    assert pull.pull(store, REFERENCE, tmp_path / "dest") == first


@pytest.mark.parametrize("kind", ["folder", "file", "foreign record", "broken record"])
def test_a_destination_that_no_pull_made_is_left_alone(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, kind: str
) -> None:
    publish("one")
    dest = tmp_path / "dest"
    if kind == "file":
        dest.write_text("mine")
    else:
        dest.mkdir()
        (dest / "mine.txt").write_text("mine")
    if "record" in kind:
        (dest / pull.RECORD).write_text("[1]" if kind == "foreign record" else "{")
    before = files(dest) if dest.is_dir() else dest.read_bytes()

    with pytest.raises(UsageError, match="no pull made it"):
        pull.pull(store, REFERENCE, dest)
    assert (files(dest) if dest.is_dir() else dest.read_bytes()) == before


def test_an_empty_destination_may_be_the_working_folder(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("one")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pull.pull(store, REFERENCE, Path())
    assert (tmp_path / "here" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("intents", "expected LINE@ALIAS"),
        ("@production", "expected LINE@ALIAS"),
        ("intents@", "expected LINE@ALIAS"),
        ("intents@staging", "has no alias staging"),
        ("intents@20990101T000000Z-0", "has no version"),
        ("intents@2026/0", "neither an alias nor a version"),
        ("intents@../2026", "neither an alias nor a version"),
        ("others@production", "has no alias"),
        ("../x@production", "expected the name of a line alone"),
    ],
)
def test_a_reference_that_names_nothing_is_refused(
    store: Store, publish: Callable[[str], Release], tmp_path: Path, reference: str, message: str
) -> None:
    publish("one")
    with pytest.raises(UsageError, match=message):
        pull.pull(store, reference, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_an_old_copy_of_the_store_is_refused_in_a_new_folder_too(
    store: Store, publish: Callable[[str], Release], tmp_path: Path
) -> None:
    old = publish("one")
    shutil.copytree(tmp_path / "store", tmp_path / "backup")
    new = publish("two")
    backup = open_store((tmp_path / "backup").as_uri())

    with pytest.raises(IntegrityError, match=rf"expected generation 2 or a later one, found 1 with {old.version}"):
        pull.pull(backup, REFERENCE, tmp_path / "dest", min_generation=2)
    assert not (tmp_path / "dest").exists()
    assert pull.pull(store, REFERENCE, tmp_path / "dest", min_generation=2) == new
    with pytest.raises(UsageError, match="a version has no generation"):
        pull.pull(store, f"intents@{old.version}", tmp_path / "other", min_generation=1)
