"""A version is pulled into whatever folder a person has, and whoever reads there sees a whole version."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import open_store, pull, pulled_folder
from qlora_retrain.storage.store import Store
from tests.storage.small_versions import (
    ADAPTER,
    LINE,
    REFERENCE,
    WEIGHTS,
    files_of,
    in_child,
    publish,
    pulled_files,
)

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def store(open_folder: Path) -> Store:
    return open_store((open_folder / "store").as_uri())


def inner(destination: Path) -> list[str]:
    return sorted(path.name for path in (destination / ".pulled").iterdir() if path.is_dir())


def test_a_destination_whose_parent_belongs_to_somebody_else_is_filled(store: Store, open_folder: Path) -> None:
    parent = open_folder / "theirs"
    destination = parent / "mine"
    destination.mkdir(parents=True)
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(destination, NOBODY, NOBODY)
    else:
        parent.chmod(0o555)

    def as_another_user() -> None:
        if is_root:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        pull.pull(store, REFERENCE, destination)
        with pytest.raises(UsageError, match="Permission denied"):
            pull.pull(store, REFERENCE, parent / "new")

    for number in (1, 2):
        publish(store, number)
        assert in_child(as_another_user) == 0
        assert pulled_files(destination) == files_of(number)
    parent.chmod(0o755)


def test_a_mount_point_in_a_read_only_file_system_is_filled_and_updated(store: Store, open_folder: Path) -> None:
    publish(store, 1)
    parent = open_folder / "parent"
    parent.mkdir()
    mount = "mount -t tmpfs none"
    program = "; ".join(
        [
            "from pathlib import Path",
            "from qlora_retrain.storage import open_store, pull",
            "from tests.storage.small_versions import *",
            f"store, destination = open_store({store.uri!r}), Path({str(parent)!r}) / 'mine'",
            "pull.pull(store, REFERENCE, destination)",
            "assert pulled_files(destination) == files_of(1)",
            "publish(store, 2)",
            "pull.pull(store, REFERENCE, destination)",
            "assert pulled_files(destination) == files_of(2) and destination.is_mount()",
            "assert (destination / 'lost+found').is_dir()",
        ]
    )
    prepare = f"{mount} {parent} && mkdir {parent}/mine && {mount} {parent}/mine && mkdir {parent}/mine/lost+found"
    script = f"{prepare} && mount -o remount,ro {parent} && ! touch {parent}/x 2>/dev/null && echo mounted && exec "
    command = ["unshare", "-rm", "sh", "-c", script + '"$@"', "sh", sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True)
    if "mounted" not in ended.stdout:
        pytest.skip(f"nothing can be mounted here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_link_stays_a_link_and_what_it_leads_to_is_filled(store: Store, tmp_path: Path, is_dangling: bool) -> None:
    publish(store, 1)
    target = tmp_path / "elsewhere" / "model"
    if not is_dangling:
        target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    pull.pull(store, REFERENCE, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert pulled_files(target) == files_of(1)


def test_a_link_that_leads_back_to_itself_is_refused(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="leads back to itself"):
        pull.pull(store, REFERENCE, tmp_path / "loop")


def test_another_file_system_is_filled_through_a_link(store: Store, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system: /dev/shm")
    publish(store, 1)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (tmp_path / "link").symlink_to(folder)
        pull.pull(store, REFERENCE, tmp_path / "link")
        publish(store, 2)
        pull.pull(store, REFERENCE, tmp_path / "link")
        assert pulled_files(Path(folder)) == files_of(2)


def test_every_name_of_the_version_is_where_it_was_in_the_layout_of_earlier_releases(
    store: Store, tmp_path: Path
) -> None:
    release = publish(store, 1)
    destination = tmp_path / "model"
    pull.pull(store, REFERENCE, destination)
    for path, data in files_of(1).items():
        assert (destination / path).read_bytes() == data
    assert json.loads((destination / "_pulled.json").read_text())["version"] == release.version
    # A version without an adapter leaves no link that leads to nothing.
    publish(store, 2, {path: data for path, data in files_of(2).items() if path != ADAPTER})
    pull.pull(store, REFERENCE, destination)
    assert not (destination / "adapter").is_symlink()
    assert len(inner(destination)) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_what_an_earlier_release_pulled_is_turned_into_the_new_layout(
    store: Store, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    pull.pull(store, REFERENCE, tmp_path / "new")
    destination = tmp_path / "flat"
    shutil.copytree((tmp_path / "new" / "current").resolve(), destination)
    if number == 2:
        publish(store, 2)

    read = list[str]()
    original = type(store).read_range
    monkeypatch.setattr(type(store), "read_range", lambda self, path, *a: read.append(path) or original(self, path, *a))
    pull.pull(store, REFERENCE, destination)
    assert pulled_files(destination) == files_of(number)
    assert (destination / WEIGHTS).read_bytes() == files_of(number)[WEIGHTS]
    assert len(inner(destination)) == 1
    assert all((destination / name).is_symlink() for name in ("model", "adapter", "manifest.json", "_pulled.json"))
    assert {path.partition("Z-")[2].partition("/")[2] for path in read} == (
        set() if number == 1 else {path for path, data in files_of(2).items() if files_of(1)[path] != data}
    )


def test_what_no_pull_made_is_neither_replaced_nor_removed(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    destination = tmp_path / "model"
    pull.pull(store, REFERENCE, destination)
    (destination / "notes.txt").write_text("mine")
    publish(store, 2)
    pull.pull(store, REFERENCE, destination)
    assert (destination / "notes.txt").read_text() == "mine"

    (destination / "adapter").unlink()
    (destination / "adapter").mkdir()
    (destination / "adapter" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="adapter: is in the way, and no pull made it"):
        pull.pull(store, REFERENCE, destination)
    assert (destination / "adapter" / "mine").read_text() == "mine"


def test_a_link_in_the_place_of_the_versions_is_not_followed(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    (tmp_path / "precious" / "folder").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".pulled").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"\.pulled: is a link"):
        pull.pull(store, REFERENCE, tmp_path / "model")
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["folder"]


def test_versions_that_somebody_removed_are_pulled_again(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    destination = tmp_path / "model"
    pull.pull(store, REFERENCE, destination)
    shutil.rmtree(destination / ".pulled")
    pull.pull(store, REFERENCE, destination)
    assert pulled_files(destination) == files_of(1)


def test_pulls_of_one_folder_at_once_all_succeed(store: Store, tmp_path: Path) -> None:
    first, second = publish(store, 1), publish(store, 2)
    destination = tmp_path / "model"
    references = [f"{LINE}@{first.version}", f"{LINE}@{second.version}", REFERENCE] * 3
    with ThreadPoolExecutor(len(references)) as pool:
        releases = list(pool.map(lambda reference: pull.pull(store, reference, destination), references))
    assert [release.version for release in releases] == [first.version, second.version, second.version] * 3
    assert pulled_files(destination) in (files_of(1), files_of(2))
    assert len(inner(destination)) == 1


def test_a_reader_sees_one_whole_version_while_others_are_pulled(store: Store, tmp_path: Path) -> None:
    versions = [publish(store, number) for number in (1, 2)]
    destination = tmp_path / "model"
    pull.pull(store, REFERENCE, destination)
    is_over = threading.Event()

    def read() -> int:
        count = 0
        while not is_over.is_set() or not count:
            with pulled_folder.reading(destination) as folder:
                number = int(json.loads((folder / "manifest.json").read_text())["version"][7])
                for path, data in files_of(number).items():
                    assert (folder / path).read_bytes() == data
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for turn in range(8):
                pull.pull(store, f"{LINE}@{versions[turn % 2].version}", destination)
        finally:
            is_over.set()
        assert all(reader.result() for reader in readers)
    # What was read when its successor came is removed by the next pull.
    pull.pull(store, REFERENCE, destination)
    assert len(inner(destination)) == 1


def test_a_folder_that_no_pull_made_is_read_as_it_is(tmp_path: Path) -> None:
    with pulled_folder.reading(tmp_path) as folder:
        assert folder == tmp_path
