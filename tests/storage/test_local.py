"""Faults of a store in a folder: disks that fill, permissions, processes that die, two file systems."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.storage.local import LocalStore
from qlora_retrain.storage.store import Conflict, NotFound


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(str(root))


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    # A RAM disk: hard links from the temporary folder to it fail with EXDEV.
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on another file system than the temporary folder")
    folder = tempfile.mkdtemp(prefix="qlora-retrain-test-", dir=memory)
    yield Path(folder)
    shutil.rmtree(folder)


def all_paths(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))


def test_reading_does_not_create_the_root(store: LocalStore, root: Path) -> None:
    with pytest.raises(NotFound):
        store.read("a")
    assert not list(store.list(""))
    assert not list(store.children(""))
    store.delete(["a"])
    assert not root.exists()


def test_files_are_0644_and_folders_0755_whatever_the_umask(store: LocalStore, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "f"
    secret.write_bytes(b"x")
    secret.chmod(0o600)
    before = os.umask(0o077)
    try:
        tag = store.write_if_absent("docs/a/written", b"x")
        store.swap("docs/a/written", b"y", tag)
        store.upload(tmp_path, "up/b", ["f"])
        store.copy([("up/b/f", "copy/c/f")])
    finally:
        os.umask(before)
    modes = {p: root.joinpath(p).stat().st_mode & 0o777 for p in ("", *all_paths(root)) if p != ".store-lock"}
    assert {p: m for p, m in modes.items() if m != (0o755 if (root / p).is_dir() else 0o644)} == {}


def test_a_copy_is_a_hard_link(store: LocalStore, root: Path) -> None:
    store.write_if_absent("a", b"x")
    store.copy([("a", "b/c")])
    assert (root / "a").samefile(root / "b/c")


def test_a_copy_to_another_file_system_is_a_real_one(store: LocalStore, root: Path, other_file_system: Path) -> None:
    store.write_if_absent("a/f", b"x")
    (root / "b").symlink_to(other_file_system)
    store.copy([("a/f", "b/c/f")])
    store.write_if_absent("b/c/g", b"y")
    assert [e.path for e in store.list("")] == ["a/f", "b/c/f", "b/c/g"]
    assert (other_file_system / "c/f").read_bytes() == b"x"


def test_hidden_files_are_never_shown_and_stale_ones_go_with_their_folder(store: LocalStore, root: Path) -> None:
    store.write_if_absent("a/f", b"x")
    (root / "a/.store-elsewhere-1-left-long-ago").write_bytes(b"half")
    (root / "b").mkdir()
    (root / "b/.store-elsewhere-1-being-written-now").write_bytes(b"half")

    assert [e.path for e in store.list("")] == ["a/f"]
    assert list(store.children("")) == ["a"]
    # Last written in 1970: far older than any writer could be.
    os.utime(root / "a/.store-elsewhere-1-left-long-ago", (0, 0))
    store.delete(["a/f", "b/g"])
    assert all_paths(root) == [".store-lock", "b", "b/.store-elsewhere-1-being-written-now"]


def test_the_hidden_file_of_a_killed_writer_is_removed_with_its_folder(
    store: LocalStore, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    # Killed in the middle of a copy, when half of the hidden file is written.
    dies = (
        "import os, shutil, sys; from pathlib import Path; from qlora_retrain.storage.local import LocalStore\n"
        "shutil.copyfile = lambda source, target: (Path(target).write_bytes(b'half'), os.kill(os.getpid(), 9))\n"
        "LocalStore(sys.argv[1]).upload(Path(sys.argv[2]), 'a', ['f'])"
    )
    result = subprocess.run([sys.executable, "-c", dies, str(root), str(tmp_path)], check=False)

    assert result.returncode == -signal.SIGKILL
    store.write_if_absent("a/g", b"x")
    assert len(all_paths(root)) == 3, "no hidden file was left"

    store.delete(["a/g"])
    assert all_paths(root) == [".store-lock"]


@pytest.mark.parametrize("call", ["write_if_absent", "swap", "upload", "copy", "download"])
def test_a_full_disk_is_cleaned_and_tried_again(
    store: LocalStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "f").write_bytes(b"new")
    tag = store.write_if_absent("f", b"old")
    before = all_paths(tmp_path)

    # Most file systems report a full disk only when the data is flushed.
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(source: Path, target: Path) -> NoReturn:
        target.write_bytes(source.read_bytes()[:1])
        full()

    monkeypatch.setattr(os, "fsync", full)
    if call == "download":
        monkeypatch.setattr(shutil, "copyfile", half)
    calls: dict[str, Callable[[], object]] = {
        "write_if_absent": lambda: store.write_if_absent("g", b"x"),
        "swap": lambda: store.swap("f", b"x", tag),
        "upload": lambda: store.upload(tmp_path, "", ["f"]),
        "copy": lambda: store.copy([("f", "g")]),
        "download": lambda: store.download("", ["f"], tmp_path),
    }
    with pytest.raises(TryAgain, match=r"the disk is full \(No space left on device\)"):
        calls[call]()
    assert [p for p in all_paths(tmp_path) if not p.endswith(".store-lock")] == before
    assert store.read("f").data == b"old"


@contextmanager
def nobody() -> Iterator[None]:
    """Root may do anything: be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_we_may_not_use_is_named(store: LocalStore, root: Path, tmp_path: Path) -> None:
    store.write_if_absent("closed/f", b"x")
    folder = root / "closed"
    folder.chmod(0)
    uses: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("closed/f"),
        "list": lambda: store.list(""),
        "children": lambda: store.children("closed"),
        "write": lambda: store.write_if_absent("closed/g", b"x"),
        "download": lambda: store.download("closed", ["f"], tmp_path / "down"),
    }
    try:
        for use in uses.values():
            with nobody(), pytest.raises(UsageError, match=f"Permission denied: .*{tmp_path.name}"):
                use()
    finally:
        folder.chmod(0o755)
    assert all_paths(root) == ["closed", "closed/f"]


def test_a_file_and_a_folder_cannot_share_a_name(store: LocalStore, tmp_path: Path) -> None:
    store.write_if_absent("a/f", b"x")
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(UsageError, match="there is a folder of that name"):
        store.write_if_absent("a", b"x")
    with pytest.raises(UsageError, match="Is a directory"):
        store.upload(tmp_path, "", ["a"])
    with pytest.raises(UsageError, match="Not a directory"):
        store.write_if_absent("a/f/g", b"x")
    with pytest.raises(UsageError, match="name too long"):
        store.write_if_absent("n" * 300, b"x")


def test_writers_survive_deletes_that_empty_their_folder(root: Path) -> None:
    stop = threading.Event()

    def keep_emptying() -> None:
        store = LocalStore(str(root))
        while not stop.is_set():
            store.delete(["a/b/other"])

    thread = threading.Thread(target=keep_emptying)
    thread.start()
    try:
        store = LocalStore(str(root))
        for i in range(100):
            store.write_if_absent(f"a/b/{i}", b".")
            store.delete([f"a/b/{i}"])
    finally:
        stop.set()
        thread.join()
    assert list(store.list("")) == []


def test_swap_waits_for_the_lock_of_another_process(store: LocalStore, root: Path) -> None:
    tag = store.write_if_absent("a", b"one")
    outcome: list[str] = []

    def swap_late() -> None:
        try:
            outcome.append(store.swap("a", b"late", tag))
        except Conflict:
            outcome.append("conflict")

    # The lock is held here, so the swap must wait; meanwhile the document changes under it.
    thread = threading.Thread(target=swap_late)
    with (root / ".store-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        (root / "a").write_bytes(b"two")
    thread.join(100)
    assert outcome == ["conflict"]


@pytest.mark.parametrize("at", ["write_bytes", "fsync", "link"])
def test_a_process_killed_while_writing_leaves_nothing_to_see(store: LocalStore, root: Path, at: str) -> None:
    program = f"""
        import os, signal, sys
        from pathlib import Path
        from qlora_retrain.storage.local import LocalStore
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(Path if {at!r} == "write_bytes" else os, {at!r}, die)
        LocalStore(sys.argv[1]).write_if_absent("a/manifest.json", b"data")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(root)], timeout=300)

    assert result.returncode == -signal.SIGKILL
    assert not list(store.list(""))
    assert not list(store.children(""))

    store.write_if_absent("a/manifest.json", b"data")
    assert [e.path for e in store.list("")] == ["a/manifest.json"]


def test_a_folder_without_hard_links_is_refused_by_the_probe(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> NoReturn:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(root))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match="Operation not permitted"):
        store.probe()


def test_links_to_their_own_folder_are_listed_once(tmp_path: Path) -> None:
    """Two of them have 2^40 names, so that listing would never end."""
    store = LocalStore(tmp_path.as_uri())
    store.write_if_absent("scratch/file", b"x")
    for name in ("first", "second"):
        (tmp_path / "scratch" / name).symlink_to(".")
    paths = [entry.path for entry in store.list("scratch")]
    assert paths == sorted(paths)
    assert {(tmp_path / path).resolve() for path in paths} == {tmp_path / "scratch" / "file"}
    assert len(paths) == 2  # through the folder itself, and through the first of the links
    # A link that leads elsewhere is followed as ever.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more").write_bytes(b"y")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [entry.path for entry in store.list("artifacts")] == ["artifacts/linked/more"]
