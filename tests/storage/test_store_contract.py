"""The contract of both backends: a local folder and S3."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import AlreadyExists, Conflict, NotFound, Store

NAMES = ["plain.txt", "with space.txt", "gruen/größe + 100%.json", "深い/階層/ファイル", "a=b&c?d#e/~(1)!'.bin"]
BAD_PATHS = ["", "/etc/passwd", "..", "a/../../b", "a//b", "./a", "a/", ".store-lock", "a/.store-x/b", "a\nb", "a\0b"]


def files(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {name}".encode())
    return folder


def race(root: str, attempt: Callable[[Store, int], str]) -> list[str]:
    """What eight threads, each with a store of its own, got from attempting the same thing at once."""
    stores = [open_store(root) for _ in range(8)]
    # All begin together; the store of each is its own, as in different processes.
    start = threading.Barrier(len(stores))

    def attempt_at_once(i: int) -> str:
        start.wait()
        return attempt(stores[i], i)

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(attempt_at_once, range(len(stores))))


def test_a_document_is_read_as_it_was_written(store: Store) -> None:
    tag = store.write_if_absent("runs/1/plan.json", b'{"a": 1}')
    stored = store.read("runs/1/plan.json")
    assert (stored.data, stored.tag) == (b'{"a": 1}', tag)


def test_an_empty_document_is_a_document(store: Store) -> None:
    store.write_if_absent("empty", b"")
    assert store.read("empty").data == b""


@pytest.mark.parametrize("path", ["nothing", "folder", "folder/file/below"])
def test_reading_what_is_not_there_is_not_found(store: Store, path: str) -> None:
    store.write_if_absent("folder/file", b"x")
    with pytest.raises(NotFound, match=path):
        store.read(path)


def test_an_empty_store_can_be_read(store: Store) -> None:
    assert list(store.list("")) == list(store.list("a")) == []
    assert list(store.children("")) == list(store.children("a")) == []
    store.delete(["a/b"])
    with pytest.raises(NotFound):
        store.read("a")


def test_writing_the_same_again_gives_the_same_tag(store: Store) -> None:
    assert store.write_if_absent("a", b"same") == store.write_if_absent("a", b"same")


def test_write_if_absent_keeps_and_shows_what_is_there(store: Store) -> None:
    tag = store.write_if_absent("a", b"first")
    with pytest.raises(AlreadyExists) as caught:
        store.write_if_absent("a", b"second")
    assert (caught.value.stored.data, caught.value.stored.tag) == (b"first", tag)
    assert store.read("a").data == b"first"


def test_swap_replaces_what_is_expected(store: Store) -> None:
    first = store.swap("aliases/production.json", b"one", None)
    second = store.swap("aliases/production.json", b"two", first)
    assert second != first
    stored = store.read("aliases/production.json")
    assert (stored.data, stored.tag) == (b"two", second)


def test_swap_refuses_another_state_than_expected(store: Store) -> None:
    first = store.write_if_absent("a", b"one")
    store.swap("a", b"two", first)
    with pytest.raises(Conflict):
        store.swap("a", b"three", first)
    with pytest.raises(Conflict):
        store.swap("a", b"three", None)
    assert store.read("a").data == b"two"


def test_swap_refuses_what_has_been_removed(store: Store) -> None:
    tag = store.write_if_absent("a", b"one")
    store.delete(["a"])
    with pytest.raises(Conflict):
        store.swap("a", b"two", tag)
    assert list(store.list("")) == []


def test_swapping_to_what_is_there_already_is_no_error(store: Store) -> None:
    first = store.write_if_absent("a", b"one")
    second = store.swap("a", b"two", first)
    assert store.swap("a", b"two", first) == store.swap("a", b"two", None) == second


def test_of_eight_that_write_if_absent_one_wins_and_all_see_it(root: str) -> None:
    def attempt(store: Store, i: int) -> str:
        data = f"by {i}".encode()
        try:
            store.write_if_absent("manifest.json", data)
        except AlreadyExists as error:
            return error.stored.data.decode()
        return f"won {i}"

    results = race(root, attempt)
    winners = [r.removeprefix("won ") for r in results if r.startswith("won ")]
    assert len(winners) == 1
    assert sorted(results) == sorted([f"won {winners[0]}"] + [f"by {winners[0]}"] * 7)
    assert open_store(root).read("manifest.json").data == f"by {winners[0]}".encode()


@pytest.mark.parametrize("exists", [True, False])
def test_of_eight_that_swap_one_wins(root: str, exists: bool) -> None:
    expected = open_store(root).write_if_absent("alias.json", b"old") if exists else None

    def attempt(store: Store, i: int) -> str:
        try:
            store.swap("alias.json", f"by {i}".encode(), expected)
        except Conflict:
            return "lost"
        return f"by {i}"

    results = race(root, attempt)
    assert results.count("lost") == 7
    assert open_store(root).read("alias.json").data.decode() in results


def test_eight_that_swap_until_they_win_lose_no_update(root: str) -> None:
    open_store(root).write_if_absent("counter", b"0:start")

    def attempt(store: Store, i: int) -> str:
        for turn in range(3):
            while True:
                stored = store.read("counter")
                count = int(stored.data.split(b":")[0])
                try:
                    store.swap("counter", f"{count + 1}:{i}.{turn}".encode(), stored.tag)
                except Conflict:
                    continue
                break
        return "done"

    race(root, attempt)
    assert open_store(root).read("counter").data.split(b":")[0] == b"24"


def test_a_folder_comes_back_as_it_went(store: Store, tmp_path: Path) -> None:
    store.upload(files(tmp_path / "up", NAMES), "artifacts/k/1", NAMES)
    assert [e.path for e in store.list("artifacts")] == sorted(f"artifacts/k/1/{n}" for n in NAMES)
    store.download("artifacts/k/1", NAMES, tmp_path / "down")
    for name in NAMES:
        assert (tmp_path / "down" / name).read_bytes() == f"bytes of {name}".encode()
    downloaded = [p for p in (tmp_path / "down").rglob("*") if p.is_file()]
    assert len(downloaded) == len(NAMES)


def test_nothing_to_do_is_no_error(store: Store, tmp_path: Path) -> None:
    store.upload(tmp_path, "a", [])
    store.download("a", [], tmp_path)
    store.copy([])
    store.delete([])


def test_upload_and_download_overwrite(store: Store, tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "f").write_text(text)
        store.upload(tmp_path, "", ["f"])
        store.download("", ["f"], tmp_path / "down")
    assert store.read("f").data == b"new"
    assert (tmp_path / "down" / "f").read_text() == "new"


def test_changing_a_downloaded_file_leaves_the_store_as_it_is(store: Store, tmp_path: Path) -> None:
    store.write_if_absent("a/f", b"stored")
    store.download("a", ["f"], tmp_path)
    with (tmp_path / "f").open("r+b") as file:
        file.write(b"CHANGE")
    assert store.read("a/f").data == b"stored"


def test_downloading_what_is_not_there_is_not_found(store: Store, tmp_path: Path) -> None:
    store.write_if_absent("a/f", b"x")
    with pytest.raises(NotFound, match="a/missing"):
        store.download("a", ["f", "missing"], tmp_path / "down")
    assert not (tmp_path / "down" / "missing").exists()


def test_uploading_what_is_not_there_is_the_callers_bug(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.upload(tmp_path, "a", ["missing"])
    assert list(store.list("")) == []


def test_a_big_file_survives_upload_copy_and_download(store: Store, tmp_path: Path) -> None:
    data = os.urandom(20 * 1024**2)
    (tmp_path / "big").write_bytes(data)
    store.upload(tmp_path, "a", ["big"])
    store.copy([("a/big", "b/big")])
    store.delete(["a/big"])
    store.download("b", ["big"], tmp_path / "down")

    assert hashlib.sha256((tmp_path / "down/big").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert [(e.path, e.size_bytes) for e in store.list("")] == [("b/big", len(data))]


def test_list_is_sorted_and_stays_in_its_folder(store: Store) -> None:
    # Names for which an order by folder, by letter case or by locale would be another one than that by bytes.
    for path in ("a/b/1", "a/b.txt", "a/b-2", "ab/1", "a/B", "a/é", "z"):
        store.write_if_absent(path, path.encode())
    below_a = sorted(["a/b/1", "a/b.txt", "a/b-2", "a/B", "a/é"], key=lambda p: p.encode())
    assert [e.path for e in store.list("a")] == below_a
    assert [e.path for e in store.list("")] == [*below_a, "ab/1", "z"]
    assert [e.size_bytes for e in store.list("a/b")] == [5]
    assert list(store.list("a/b/1")) == list(store.list("nothing")) == []


def test_children_are_files_and_folders_once_each(store: Store) -> None:
    for path in ("a/x/1", "a/x/2", "a/w.json", "a/y/z/1", "b"):
        store.write_if_absent(path, b".")
    assert list(store.children("")) == ["a", "b"]
    assert list(store.children("a")) == ["w.json", "x", "y"]
    assert list(store.children("a/x/1")) == list(store.children("nothing")) == []


def test_copies_are_independent(store: Store) -> None:
    tag = store.write_if_absent("a/1", b"one")
    store.write_if_absent("c", b"overwritten")
    store.copy([("a/1", "b c/ü"), ("a/1", "c")])
    store.swap("a/1", b"two", tag)
    assert store.read("b c/ü").data == store.read("c").data == b"one"
    store.delete(["b c/ü"])
    assert [e.path for e in store.list("")] == ["a/1", "c"]


def test_copying_a_copy_over_its_source_changes_nothing(store: Store) -> None:
    store.write_if_absent("a", b"one")
    store.copy([("a", "b")])
    store.copy([("b", "a")])
    assert [e.path for e in store.list("")] == ["a", "b"]


def test_copying_what_is_not_there_is_not_found(store: Store) -> None:
    store.write_if_absent("folder/f", b"x")
    for source in ("missing", "folder"):
        with pytest.raises(NotFound, match=source):
            store.copy([(source, "b")])
    assert [e.path for e in store.list("")] == ["folder/f"]


def test_delete_empties_folders_and_does_not_mind_what_is_gone(store: Store) -> None:
    for path in ("a/b/c/1", "a/b/2", "d/3"):
        store.write_if_absent(path, b".")
    store.delete(["a/b/c/1", "a/b/c/1", "a/nothing", "never/was", "d/3/below"])
    assert list(store.children("a/b")) == ["2"]
    store.delete(["a/b/2", "d/3"])
    assert list(store.children("")) == []
    store.write_if_absent("a/b/c/1", b"again")


def test_a_path_that_could_leave_the_store_is_refused_everywhere(store: Store, tmp_path: Path) -> None:
    store.write_if_absent("f", b"x")
    (tmp_path / "f").write_bytes(b"x")
    for path in BAD_PATHS:
        for attempt in uses(store, path, tmp_path):
            with pytest.raises(UsageError, match="not a path in a store"):
                attempt()
    assert [e.path for e in store.list("")] == ["f"]


def uses(store: Store, path: str, tmp_path: Path) -> list[Callable[[], object]]:
    """Every way to hand a path to a store."""
    ways: list[Callable[[], object]] = [
        lambda: store.read(path),
        lambda: store.write_if_absent(path, b"y"),
        lambda: store.swap(path, b"y", None),
        lambda: store.swap(path, b"y", "tag"),
        lambda: store.upload(tmp_path, "a", [path]),
        lambda: store.download("", [path], tmp_path / "down"),
        lambda: store.copy([("f", path)]),
        lambda: store.copy([(path, "g")]),
        lambda: store.delete([path]),
    ]
    # An empty prefix is the root, so it is allowed.
    if path:
        ways += [
            lambda: store.list(path),
            lambda: store.children(path),
            lambda: store.upload(tmp_path, path, ["f"]),
            lambda: store.download(path, ["f"], tmp_path / "down"),
        ]
    return ways


def test_the_probe_passes_and_leaves_nothing(store: Store) -> None:
    store.probe()
    assert list(store.children("")) == []


def test_open_store_refuses_other_schemes_and_secrets() -> None:
    for uri in ("hf://owner/name", "ftp://host/x", "s3://key:secret@bucket/x", "s3:///x", "file://host/x"):
        with pytest.raises(UsageError) as caught:
            open_store(uri)
        assert "secret" not in str(caught.value)


def test_the_start_of_a_file_is_read_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "empty").write_bytes(b"")
    store.upload(tmp_path, "folder", ["long", "empty"])
    assert store.read_start("folder/long", 8) == bytes(range(8))
    assert store.read_start("folder/long", 300_000) == bytes(range(256)) * 1000
    assert store.read_start("folder/empty", 8) == b""
    with pytest.raises(NotFound):
        store.read_start("folder/none", 8)


def test_a_range_of_a_file_is_read_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(range(256)) * 1000)
    store.upload(tmp_path, "folder", ["long"])
    assert store.read_range("folder/long", 1000, 8) == bytes(range(232, 240))
    assert store.read_range("folder/long", 255_999, 8) == b"\xff"
    assert store.read_range("folder/long", 256_000, 8) == b""
    with pytest.raises(NotFound):
        store.read_range("folder/none", 1000, 8)


def test_a_hash_is_that_of_the_bytes_that_are_there_now(store: Store, tmp_path: Path) -> None:
    for content in (b"", b"a" * 3_000_000, b"b" * 3_000_000):
        (tmp_path / "model.bin").write_bytes(content)
        store.upload(tmp_path, "folder", ["model.bin"])
        assert store.sha256("folder/model.bin") == hashlib.sha256(content).hexdigest()
    with pytest.raises(NotFound):
        store.sha256("folder/another")


def test_a_document_that_is_too_large_is_refused_and_not_read_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_retrain.storage.store.MAX_DOCUMENT_BYTES", 100)
    store.write_if_absent("largest", b"x" * 100)
    assert len(store.read("largest").data) == 100
    store.write_if_absent("larger", b"x" * 101)
    with pytest.raises(IntegrityError, match=r"larger: expected a document of at most"):
        store.read("larger")
