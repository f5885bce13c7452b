"""What a hostile store says is refused as such (13), before anything of it becomes a path or fills a disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import audit, open_store, pull, registry, release_files
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.storage.small_versions import (
    ADAPTER,
    EXPORT,
    LINE,
    REFERENCE,
    SHARED,
    WEIGHTS,
    files_of,
    listed,
    publish,
    pulled_files,
    release_of,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def forge(store: Store, listed_files: tuple[File, ...], **changes: Any) -> Release:
    """Write a manifest as whoever may write to the store can, and let `production` name it."""
    release = release_of(listed_files, 9)
    folder = registry.version_folder(LINE, release.version)
    for path, data in files_of(1).items():
        store.write_if_absent(f"{folder}/{path}", data)
    data = json.dumps(json.loads(release.model_dump_json()) | changes).encode()
    store.write_if_absent(f"{folder}/manifest.json", data)
    release._sha256 = hashing.sha256_bytes(data)
    registry.move_alias(store, LINE, "production", release, reason="a forgery", is_verified=True)
    return release


def with_path(path: str) -> tuple[File, ...]:
    good = listed(files_of(1))
    return (*good, good[0].model_copy(update={"path": path}))


@pytest.mark.parametrize(
    "path",
    [
        "../outside.json",
        "model/../../outside.json",
        "/etc/outside.json",
        "model//outside.json",
        "model/./outside.json",
        "model/nul\0.json",
        "model/line\nbreak.json",
        "",
        "model/",
        "model/" + "n" * 300 + ".json",
        "model/" + "é" * 130 + ".json",
        "n/" * 600 + "deep.json",
        WEIGHTS,
        f"{WEIGHTS}/inside.json",
        "model",
        "manifest.json",
        "_pulled.json",
        "current",
        "current/config.json",
        ".pulled/lock",
        ".store-lock",
        "model/Config.json",
        "MODEL/other.json",
        "Current",
        "model/con.json",
        "COM1.txt/a.json",
        "model/a\\..\\outside.json",
        "C:/outside.json",
    ],
)
def test_a_path_that_no_version_has_is_refused(store: Store, tmp_path: Path, path: str) -> None:
    forge(store, with_path(path))
    with pytest.raises(IntegrityError, match="somebody else"):
        pull.pull(store, REFERENCE, tmp_path / "dest" / "model")
    assert not (tmp_path / "dest").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"store"}


def test_two_names_that_differ_in_the_form_of_an_accent_alone_are_refused() -> None:
    files = tuple(File(path=f"model/{name}.json", size_bytes=1, sha256="") for name in ("\u00e9", "e\u0301"))
    with pytest.raises(IntegrityError, match="some disks take for one"):
        release_files.refuse_hostile_list(files, "a manifest")
    release_files.refuse_hostile_list(files[:1], "a manifest")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    path=st.text(st.characters(exclude_categories=()), max_size=40)
    | st.lists(st.sampled_from(["..", ".", "", "model", "a.json", "\0", "\ud800", "~", "C:", "\\", "con"])).map(
        "/".join
    ),
    size_bytes=st.integers(-(2**70), 2**70),
    sha256=st.text(max_size=8),
)
def test_no_list_of_files_leads_to_another_end_than_13(
    tmp_path_factory: pytest.TempPathFactory, path: str, size_bytes: int, sha256: str
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    store = open_store((folder / "store").as_uri())
    (file, *others) = listed(files_of(1))
    document = json.loads(release_of((file, *others), 9).model_dump_json())
    document["files"].append({"path": path, "size_bytes": size_bytes, "sha256": sha256})
    data = json.dumps(document).encode()
    store.write_if_absent(f"{registry.version_folder(LINE, document['version'])}/manifest.json", data)
    with pytest.raises(IntegrityError):
        pull.pull(store, f"{LINE}@{document['version']}", folder / "model")
    assert {entry.name for entry in folder.iterdir()} == {"store"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"line": "other"}, "is the manifest of other"),
        ({"version": "20260101T000000Z-0"}, "is the manifest of intents 20260101T000000Z-0"),
        ({"files": "all"}, "not a version's manifest"),
        ({"content_hash": "f" * 64}, "its files give"),
    ],
)
def test_a_manifest_of_something_else_is_refused(
    store: Store, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    forge(store, listed(files_of(1)), **changes)
    with pytest.raises(IntegrityError, match=message):
        pull.pull(store, REFERENCE, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("size_bytes", [-1, 0, 899, 901, 2**63, 2**80])
def test_a_size_that_is_not_that_of_the_file_is_refused_before_anything_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    files = [f.model_copy(update={"size_bytes": size_bytes} if f.path == WEIGHTS else {}) for f in listed(files_of(1))]
    forge(store, tuple(files))
    monkeypatch.setattr(type(store), "read_range", lambda *_: pytest.fail("was read"))
    with pytest.raises(IntegrityError, match=rf"model\.safetensors.*{size_bytes} bytes"):
        pull.pull(store, REFERENCE, tmp_path / "model")


@pytest.mark.parametrize("version", ["../../x", "a/b", "", "x" * 200, "2026\0"])
def test_an_alias_that_names_no_version_is_refused(store: Store, tmp_path: Path, version: str) -> None:
    publish(store, 1)
    path = audit.alias_path(LINE, "production")
    stored = store.read(path)
    store.swap(path, json.dumps(json.loads(stored.data) | {"version": version}).encode(), stored.tag)
    with pytest.raises(IntegrityError, match="no version's name"):
        pull.pull(store, REFERENCE, tmp_path / "model")


def test_a_version_is_never_looked_up_as_an_alias(store: Store, tmp_path: Path) -> None:
    first, second = publish(store, 1), publish(store, 2)
    stored = store.read(audit.alias_path(LINE, "production"))
    # As a writer of the aliases would redirect who pins the first version.
    store.write_if_absent(audit.alias_path(LINE, first.version), stored.data)
    assert pull.pull(store, f"{LINE}@{first.version}", tmp_path / "model") == first
    assert pulled_files(tmp_path / "model") == files_of(1)
    assert second.version != first.version


def test_the_manifest_can_be_pinned_by_its_hash(store: Store, tmp_path: Path) -> None:
    release = publish(store, 1)
    with pytest.raises(IntegrityError, match=f"as --sha256 says, found {release.sha256}"):
        pull.pull(store, f"{LINE}@{release.version}", tmp_path / "model", sha256="0" * 64)
    assert not (tmp_path / "model").exists()
    pull.pull(store, f"{LINE}@{release.version}", tmp_path / "model", sha256=release.sha256)
    with pytest.raises(UsageError, match="expected 64 hex digits"):
        pull.pull(store, REFERENCE, tmp_path / "model", sha256=release.sha256[:12])


@pytest.mark.parametrize("by", ["version", "alias"])
def test_another_manifest_of_a_version_that_was_pulled_is_refused(store: Store, tmp_path: Path, by: str) -> None:
    release = publish(store, 1)
    reference = REFERENCE if by == "alias" else f"{LINE}@{release.version}"
    pull.pull(store, reference, tmp_path / "model")
    # Whoever may write both documents of a store without keys.
    path = f"{registry.version_folder(LINE, release.version)}/manifest.json"
    data = json.dumps(json.loads(store.read(path).data) | {"created_at": "never"}).encode()
    store.swap(path, data, store.read(path).tag)
    changed = registry.read_release(store, LINE, release.version)
    alias = store.read(audit.alias_path(LINE, "production"))
    document = json.loads(alias.data) | {"manifest_sha256": changed.sha256}
    store.swap(audit.alias_path(LINE, "production"), json.dumps(document).encode(), alias.tag)

    with pytest.raises(IntegrityError, match=f"expected .* sha256 is {release.sha256}, as an earlier pull"):
        pull.pull(store, reference, tmp_path / "model")
    # The publisher has said that it is right.
    pull.pull(store, reference, tmp_path / "model", sha256=changed.sha256)
    pull.pull(store, reference, tmp_path / "model")


@pytest.mark.parametrize(
    ("parts", "paths"),
    [
        (["adapter"], {ADAPTER, "model/config.json"}),
        (["model"], {WEIGHTS, "model/config.json"}),
        (["exports/gguf-q8_0"], {EXPORT}),
        (["adapter", "exports/gguf-q8_0"], {ADAPTER, "model/config.json", EXPORT}),
    ],
)
def test_who_needs_a_part_gets_that_part_and_the_papers(
    store: Store, tmp_path: Path, parts: list[str], paths: set[str]
) -> None:
    publish(store, 1)
    pull.pull(store, REFERENCE, tmp_path / "model", parts=parts)
    assert pulled_files(tmp_path / "model").keys() == paths | {"README.md", "recipe.json"}
    assert json.loads((tmp_path / "model" / "_pulled.json").read_text())["parts"] == sorted(parts)
    # The rest comes later, and what is there is not fetched again.
    pull.pull(store, REFERENCE, tmp_path / "model")
    assert pulled_files(tmp_path / "model") == files_of(1)


def test_a_part_that_the_version_has_not_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    publish(store, 1, {path: data for path, data in files_of(1).items() if path in (*SHARED, WEIGHTS)})
    with pytest.raises(UsageError, match="has no part exports/gguf-q4_k_m; it has model"):
        pull.pull(store, REFERENCE, tmp_path / "model", parts=["exports/gguf-q4_k_m"])
    assert not (tmp_path / "model").exists()
