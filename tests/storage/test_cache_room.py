"""The node cache has a size: what was used least recently goes first, and never what a step reads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import cache, cache_room
from qlora_retrain.storage.artifact import File

SIZE_BYTES = 1000
READER = """
import sys
from pathlib import Path
from qlora_retrain.storage import cache_room
cache_room.use(Path(sys.argv[1]), Path(sys.argv[2]))
print("reads", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def three_inputs_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_room.SIZE_VARIABLE, str(3.5 * SIZE_BYTES / 2**30))


def fetch(letter: str, *, promised_bytes: int = SIZE_BYTES) -> Path:
    """Fetch an input whose key is one hexadecimal digit, 64 times."""
    data = (letter * SIZE_BYTES).encode()
    file = File(path="a", size_bytes=promised_bytes, sha256=hashlib.sha256(data).hexdigest())
    return cache.fetch("x", letter * 64, lambda folder: (folder / "a").write_bytes(data), (file,))


def fetch_in_a_step(letter: str, *, promised_bytes: int = SIZE_BYTES) -> None:
    with cache.work_folder():
        fetch(letter, promised_bytes=promised_bytes)


def keys(node_cache: Path) -> set[str]:
    locks = {path.name.removeprefix("x-").removesuffix(".lock") for path in (node_cache / "locks").iterdir()}
    folders = {path.name for path in (node_cache / "x").iterdir()}
    assert locks == folders
    return {name[0] for name in folders}


def used_at(node_cache: Path, key: str, seconds_ago: float) -> None:
    at = time.time() - seconds_ago
    os.utime(node_cache / "locks" / f"x-{key * 64}.lock", (at, at))


def test_the_least_recently_used_goes_and_a_use_counts(node_cache: Path) -> None:
    for age, key in enumerate("cba"):
        fetch_in_a_step(key)
        used_at(node_cache, key, 100 - age)
    fetch_in_a_step("c")  # a hit: now `b` is the one that was not used for longest
    fetch_in_a_step("d")
    assert keys(node_cache) == {"a", "c", "d"}


def test_what_a_step_reads_stays_even_where_the_cache_is_too_small(node_cache: Path) -> None:
    with cache.work_folder():
        folders = [fetch(key) for key in "abcde"]
        assert all((folder / "a").is_file() for folder in folders)
    fetch_in_a_step("f")
    assert len(keys(node_cache)) == 3


def test_what_another_process_reads_stays_until_that_is_over_or_killed(node_cache: Path) -> None:
    for key in "abc":
        fetch_in_a_step(key)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(node_cache), str(node_cache / "x" / ("a" * 64))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    with reader.stdin, reader.stdout:
        assert reader.stdout.readline() == b"reads\n"
        for age, key in enumerate("abc"):
            used_at(node_cache, key, 100 - age)
        fetch_in_a_step("d")
        assert keys(node_cache) == {"a", "c", "d"}
        reader.kill()
        reader.wait()
    used_at(node_cache, "a", 100)
    fetch_in_a_step("e")
    assert keys(node_cache) == {"c", "d", "e"}


def test_what_an_eviction_that_was_killed_has_left_goes(node_cache: Path) -> None:
    leftover = node_cache / "x" / ".evicted-0123"
    leftover.mkdir(parents=True)
    (leftover / "a").write_bytes(b"a" * 10_000)
    fetch_in_a_step("a")
    assert keys(node_cache) == {"a"}


def test_a_disk_that_others_fill_makes_room_below_the_size_too(
    node_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache_room.SIZE_VARIABLE, "1e12")
    for key in "abc":
        fetch_in_a_step(key)
    fetch_in_a_step("d", promised_bytes=2**60)  # no disk has so much free
    assert keys(node_cache) == {"d"}


def test_what_is_not_of_the_cache_is_neither_evicted_nor_cleaned(
    node_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person gives the folder in which they keep everything."""
    # As root, which this cannot keep out, the test sees less.
    (node_cache / "lost+found").mkdir(parents=True, mode=0o000)
    files = [node_cache / name for name in ("project/checkpoints/a", "uv/a", "uv.lock", "x/notes/a")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"a" * 10 * SIZE_BYTES)
    monkeypatch.setenv("QLORA_RETRAIN_WORK", str(node_cache))
    for key in "abcde":
        fetch_in_a_step(key)
    assert all(file.exists() for file in files)
    # Nor does it take their room.
    assert len(list((node_cache / "x").glob("?" * 64))) == 3


def test_a_fetch_that_fails_leaves_no_lock(node_cache: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        cache.fetch("x", "k", lambda folder: (_ for _ in ()).throw(OSError("gone")), ())
    assert list((node_cache / "locks").iterdir()) == []


@pytest.mark.parametrize("text", ["many", "0", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_room.SIZE_VARIABLE, text)
    with pytest.raises(UsageError, match="expected a number of GiB above 0"):
        fetch("a")


def test_without_a_setting_half_of_the_disk_is_the_size(node_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache_room.SIZE_VARIABLE)
    for key in "abcde":
        fetch_in_a_step(key)
    assert len(keys(node_cache)) == 5
