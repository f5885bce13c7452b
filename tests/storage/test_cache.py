"""The node cache: checked at every use, shared by processes, clean after those that died."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import cache
from qlora_retrain.storage.artifact import File

CONTENT = {"a.txt": b"one", "sub/b.txt": b"two"}
FILES = tuple(File(path=p, size_bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for p, d in CONTENT.items())


class Download:
    """Fills a folder, counting its calls."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        for path, data in self.content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_input_is_fetched_once() -> None:
    download = Download(CONTENT)
    first = cache.fetch("x", "k", download, FILES)
    assert cache.fetch("x", "k", download, FILES) == first
    assert content(first) == CONTENT
    assert download.calls == 1


def test_a_cache_where_no_folder_can_be_made_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_RETRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match="Not a directory"):
        cache.fetch("x", "k", Download(CONTENT), FILES)
    with pytest.raises(UsageError, match="Not a directory"), cache.work_folder():
        pass


def test_a_full_disk_of_the_cache_means_try_again() -> None:
    def fills_it(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with pytest.raises(TryAgain, match="the disk is full") as caught:
        cache.fetch("x", "k", fills_it, FILES)
    assert caught.value.cause == "disk_full"


@pytest.mark.parametrize("fault", ["flipped", "missing", "added"])
def test_an_input_that_was_changed_on_this_machine_is_fetched_again(fault: str) -> None:
    download = Download(CONTENT)
    folder = cache.fetch("x", "k", download, FILES)
    path = folder / "a.txt"
    if fault == "flipped":
        path.chmod(0o644)
        path.write_bytes(b"onf")
    elif fault == "missing":
        path.unlink()
    else:
        (folder / "c.jsonl").write_text("a row that nobody pinned")

    assert content(cache.fetch("x", "k", download, FILES)) == CONTENT
    assert download.calls == 2


def test_a_fresh_download_that_is_wrong_is_refused_and_not_kept(node_cache: Path) -> None:
    with pytest.raises(IntegrityError, match=r"x: a\.txt: expected sha256"):
        cache.fetch("x", "k", Download({**CONTENT, "a.txt": b"onf"}), FILES)
    with pytest.raises(IntegrityError, match=r"x: sub/b\.txt: No such file"):
        cache.fetch("x", "k", Download({"a.txt": b"one"}), FILES)
    assert not [p for p in node_cache.rglob("*") if p.is_file()]


def test_a_download_that_fails_leaves_nothing(node_cache: Path) -> None:
    def download(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise TryAgain("the network is gone")

    with pytest.raises(TryAgain):
        cache.fetch("x", "k", download, FILES)
    assert not [p for p in node_cache.rglob("*") if p.is_file()]


def test_cached_files_are_read_only() -> None:
    folder = cache.fetch("x", "k", Download(CONTENT), FILES)
    assert {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()} == {0o444}


def test_eight_at_once_get_the_same_folder() -> None:
    contents: list[dict[str, bytes]] = []
    # All begin together, so that they find an empty cache and race for the rename.
    barrier = threading.Barrier(8)

    def fetch_once() -> None:
        barrier.wait()
        contents.append(content(cache.fetch("x", "k", Download(CONTENT), FILES)))

    threads = [threading.Thread(target=fetch_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [CONTENT] * 8


def test_a_work_folder_is_removed_after_its_block(node_cache: Path) -> None:
    with cache.work_folder() as work:
        (work / "a").write_text("x")
        with cache.work_folder() as second:
            assert second != work
            assert work.is_dir()
    assert list((node_cache / "work").iterdir()) == []


def test_a_step_works_on_its_own_disk_and_inputs_are_fetched_on_the_disk_of_the_cache(
    node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pods share the cache, nothing but inputs is on it; a rename between disks would be refused."""
    monkeypatch.setenv("QLORA_RETRAIN_WORK", str(tmp_path / "disk" / "work"))
    arrived: list[Path] = []

    def download(folder: Path) -> None:
        arrived.append(folder)
        Download(CONTENT)(folder)

    with cache.work_folder() as work:
        assert work.parent == tmp_path / "disk" / "work"
        assert cache.fetch("x", "k", download, FILES) == node_cache / "x" / "k"
        assert list(work.iterdir()) == []
    assert [folder.is_relative_to(node_cache) for folder in arrived] == [True]
    assert list((tmp_path / "disk" / "work").iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_process(node_cache: Path) -> None:
    # Killed while it holds its work folder: nothing of Python's own cleaning up runs.
    program = (
        "import os\nfrom qlora_retrain.storage import cache\n"
        "with cache.work_folder() as work:\n    (work / 'big').write_text('x')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "QLORA_RETRAIN_CACHE": str(node_cache)})

    assert len(list((node_cache / "work").iterdir())) == 2
    with cache.work_folder() as work:
        assert sorted((node_cache / "work").iterdir()) == sorted([work, work.with_suffix(".lock")])


def test_a_folder_in_use_is_left_alone_and_a_lock_that_vanishes_is_no_fault(
    node_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = node_cache / "work"
    parent.mkdir(parents=True)
    used = parent / ("0" * 12)
    used.mkdir()
    # A lock file that another process removes between the listing and the opening.
    real_glob: Callable[..., object] = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*real_glob(self, pattern), self / f"{'1' * 12}.lock"])  # type: ignore[misc]
    with used.with_suffix(".lock").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with cache.work_folder():
            assert used.is_dir()
