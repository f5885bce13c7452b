"""A pull that is killed at any call, or that breaks off, is finished by the next one, which fetches only the rest."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, TryAgain
from qlora_retrain.storage import atomic_files, open_store, pull, pulled_folder, range_download, registry
from qlora_retrain.storage.local import LocalStore
from qlora_retrain.storage.store import Store
from tests.storage.dying_store import kill_at
from tests.storage.small_versions import LINE, REFERENCE, SHARED, WEIGHTS, files_of, in_child, publish, pulled_files

Ranges = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file of 900 bytes travel in nine ranges, of which three are under way."""
    monkeypatch.setattr(range_download, "RANGE_BYTES", 100)
    monkeypatch.setattr(range_download, "NUM_RANGES", 3)


@pytest.fixture
def ranges(store: Store, monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """The path in its version, and the first byte, of every range that is read from now on."""
    ranges: Ranges = []
    original = type(store).read_range

    def read_range(self: Store, path: str, start: int, size_bytes: int) -> bytes:
        ranges.append(("/".join(path.split("/")[4:]), start))
        return original(self, path, start, size_bytes)

    monkeypatch.setattr(type(store), "read_range", read_range)
    return ranges


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: links by where they lead, files by their content."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def kill_at_every_call(store: Store, destination: Path, prepare: Callable[[], None], every: int) -> int:
    """Kill a pull at each of its calls, and compare what two further ones leave with a pull that nobody killed.

    Returns:
        The number of calls.
    """
    prepare()
    pull.pull(store, REFERENCE, destination)
    pull.pull(store, REFERENCE, destination)
    whole, names = tree(destination / "current"), {path.name for path in destination.iterdir()}

    call, ended = 1, None
    while ended != 0:
        prepare()

        def killed(call: int = call) -> None:
            kill_at(call, str(destination))()
            pull.pull(open_store(store.uri), REFERENCE, destination)

        ended = in_child(killed)
        assert ended in (0, -signal.SIGKILL), f"call {call}"
        # In a reader's eyes there is a whole version at any time: the old one or the new one.
        if (destination / "current").exists():
            assert pulled_files(destination) in (files_of(1), files_of(2)), f"call {call}"
        for _ in range(2):
            pull.pull(store, REFERENCE, destination)
            assert tree(destination / "current") == whole, f"call {call}"
            assert {path.name for path in destination.iterdir()} == names, f"call {call}"
            assert sum(path.is_dir() for path in (destination / ".pulled").iterdir()) == 1, f"call {call}"
        call += every if ended else 0
    return call


def fresh(store: Store, destination: Path) -> Callable[[], None]:
    publish(store, 2)
    return lambda: shutil.rmtree(destination, ignore_errors=True)


def update(store: Store, destination: Path) -> Callable[[], None]:
    publish(store, 1)
    earlier = destination.with_name("earlier")
    pull.pull(store, REFERENCE, earlier)
    publish(store, 2)

    def prepare() -> None:
        shutil.rmtree(destination, ignore_errors=True)
        shutil.copytree(earlier, destination, symlinks=True)

    return prepare


def flat(store: Store, destination: Path) -> Callable[[], None]:
    prepare_update = update(store, destination)

    def prepare() -> None:
        prepare_update()
        version = (destination / "current").resolve()
        shutil.copytree(version, destination.with_name("flat"), dirs_exist_ok=True)
        shutil.rmtree(destination)
        destination.with_name("flat").rename(destination)

    return prepare


CASES = {"fresh": fresh, "update": update, "flat": flat}


@pytest.mark.parametrize("case", CASES)
def test_a_pull_that_is_killed_at_any_call_is_finished_by_the_next(root: str, tmp_path: Path, case: str) -> None:
    store, destination = open_store(root), tmp_path / "model"
    # Every fifth call here, and few with a server; `make soak` has every one.
    every = 5 if root.startswith("file:") else 50
    assert kill_at_every_call(store, destination, CASES[case](store, destination), every) > 30


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_a_pull_that_is_killed_at_each_call_is_finished_by_the_next(root: str, tmp_path: Path, case: str) -> None:
    store, destination = open_store(root), tmp_path / "model"
    assert kill_at_every_call(store, destination, CASES[case](store, destination), 1) > 30


def test_what_breaks_off_is_continued_where_it_stopped(
    store: Store, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    recording = type(store).read_range

    def breaks_off(self: Store, path: str, start: int, size_bytes: int) -> bytes:
        if path.endswith(WEIGHTS) and start == 500:
            raise TryAgain("made up")
        return recording(self, path, start, size_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "read_range", breaks_off)
        with pytest.raises(TryAgain):
            pull.pull(store, REFERENCE, tmp_path / "model")
    assert not (tmp_path / "model" / "current").exists()

    ranges.clear()
    pull.pull(store, REFERENCE, tmp_path / "model")
    assert pulled_files(tmp_path / "model") == files_of(1)
    # What comes after it had not begun.
    assert {path for path, _ in ranges} == {WEIGHTS, "recipe.json"}
    assert min(start for path, start in ranges if path == WEIGHTS) == 500


def test_a_beginning_with_other_bytes_is_replaced(store: Store, ranges: Ranges, tmp_path: Path) -> None:
    publish(store, 1)
    destination = tmp_path / "model"
    pull.pull(store, REFERENCE, destination)
    (version,) = (destination / ".pulled").glob("*.a")
    # As a pull that was killed leaves it, on a disk that lost a block.
    (destination / "current").unlink()
    (version / "manifest.json").unlink()
    (version / WEIGHTS).write_bytes(b"another beginning")
    ranges.clear()
    pull.pull(store, REFERENCE, destination)
    assert pulled_files(destination) == files_of(1)
    assert {path for path, _ in ranges} == {WEIGHTS}
    assert {start for _, start in ranges} >= set(range(0, 900, 100))


def test_a_new_version_brings_only_the_files_that_changed(store: Store, ranges: Ranges, tmp_path: Path) -> None:
    publish(store, 1)
    pull.pull(store, REFERENCE, tmp_path / "model")
    publish(store, 2)
    ranges.clear()
    pull.pull(store, REFERENCE, tmp_path / "model")
    assert {path for path, _ in ranges} == files_of(2).keys() - SHARED.keys()
    # The link to the version before is gone with that version.
    assert (tmp_path / "model" / "README.md").stat().st_nlink == 1


def test_a_damaged_file_alone_is_fetched_again_and_its_twin_stays(store: Store, ranges: Ranges, tmp_path: Path) -> None:
    publish(store, 1)
    pull.pull(store, REFERENCE, tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).write_bytes(b"damaged")
    ranges.clear()
    with pulled_folder.reading(tmp_path / "model") as folder:
        pull.pull(store, REFERENCE, tmp_path / "model")
        assert (folder / WEIGHTS).read_bytes() == b"damaged"
    assert pulled_files(tmp_path / "model") == files_of(1)
    assert {path for path, _ in ranges} == {WEIGHTS}


def test_bytes_that_are_not_those_published_leave_nothing(store: Store, tmp_path: Path) -> None:
    release = publish(store, 1)
    path = f"{registry.version_folder(LINE, release.version)}/{WEIGHTS}"
    store.swap(path, files_of(1)[WEIGHTS][::-1], store.read(path).tag)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: is not what was published"):
        pull.pull(store, REFERENCE, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_disk_without_room_is_refused_before_it_is_full(
    store: Store, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    ranges.clear()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic_files.shutil, "disk_usage", lambda path: usage._replace(free=2000))
    with pytest.raises(TryAgain, match="expected room for") as caught:
        pull.pull(store, REFERENCE, tmp_path / "model")
    assert caught.value.cause == "disk_full"
    assert ranges == []


def test_a_signal_ends_a_pull_at_once_though_the_store_hangs(tmp_path: Path) -> None:
    store = LocalStore((tmp_path / "store").as_uri())
    publish(store, 1)
    program = (
        "import os, sys, time\n"
        "from qlora_retrain.storage.local import LocalStore\n"
        "from qlora_retrain.cli.main import main\n"
        # In one call, since several threads read.
        "def hang(*_):\n os.write(1, b'hangs\\n')\n time.sleep(300)\n"
        "LocalStore.read_range = hang\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["pull", REFERENCE, str(tmp_path / "model"), "--root", store.uri]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "the same command goes on where this one stopped" in errors
    pull.pull(store, REFERENCE, tmp_path / "model")
    assert pulled_files(tmp_path / "model") == files_of(1)


def test_pulls_that_break_off_at_every_range_come_to_an_end(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    original, allowed = type(store).read_range, list[int]()

    def read_range(self: Store, path: str, start: int, size_bytes: int) -> bytes:
        if not allowed:
            raise TryAgain("made up")
        allowed.pop()
        return original(self, path, start, size_bytes)

    monkeypatch.setattr(type(store), "read_range", read_range)
    # Each pull gets four ranges of 30, and goes on behind what the ones before have.
    for _ in range(30):
        allowed[:] = [0] * 4
        with contextlib.suppress(TryAgain):
            pull.pull(store, REFERENCE, tmp_path / "model")
            break
    assert pulled_files(tmp_path / "model") == files_of(1)
