"""Checkpoints of several attempts in a store: how many are kept, which, and which are passed over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_retrain.core.errors import TryAgain
from qlora_retrain.lm import checkpoints
from qlora_retrain.pipeline import checkpoint_sync
from qlora_retrain.storage import key_admin
from qlora_retrain.storage.local import LocalStore
from qlora_retrain.storage.store import Entry, Store

PREFIX = "scratch/train_qlora/abc"


def save(folder: Path, step: int) -> None:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter.safetensors").write_bytes(b"weights %d" % step)
    checkpoints.write_marker(checkpoint, step)


def stored_checkpoints(store: Store) -> list[str]:
    return sorted({entry.path.removeprefix(f"{PREFIX}/").rpartition("/")[0] for entry in store.list(PREFIX)})


def test_two_checkpoints_are_kept_of_however_many_attempts(store: Store, tmp_path: Path) -> None:
    for number, saved in enumerate([(1, 2, 3), (4, 5), (6,), (7, 8, 9)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        restored = checkpoint_sync.restore(store, PREFIX, folder)
        assert restored == (saved[0] - 1 or None)
        uploader = checkpoint_sync.CheckpointUploader(store, PREFIX, f"attempt-{number}", folder)
        uploader.start()
        for step in saved:
            save(folder, step)
            uploader.sync()
            assert len(stored_checkpoints(store)) <= 2
        uploader.stop(sync=True)
    assert stored_checkpoints(store) == ["attempt-3/checkpoint-8", "attempt-3/checkpoint-9"]


def test_an_attempt_that_is_behind_leaves_the_checkpoints_of_one_that_is_ahead(store: Store, tmp_path: Path) -> None:
    ahead, behind = (
        checkpoint_sync.CheckpointUploader(store, PREFIX, name, tmp_path / name) for name in ("ahead", "behind")
    )
    for step in (7, 8):
        save(tmp_path / "ahead", step)
    ahead.sync()
    for step in (1, 2, 3):
        save(tmp_path / "behind", step)
    behind.sync()
    newest_of_both = ["ahead/checkpoint-7", "ahead/checkpoint-8", "behind/checkpoint-2", "behind/checkpoint-3"]
    assert stored_checkpoints(store) == newest_of_both
    save(tmp_path / "ahead", 9)
    ahead.sync()
    assert stored_checkpoints(store) == ["ahead/checkpoint-8", "ahead/checkpoint-9"]


def put(store: Store, path: str, files: dict[str, bytes], tmp_path: Path) -> None:
    """Write files into the store, as anybody could who may write below scratch."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    store.upload(folder, path, files)


def marker(step: object, *files: object) -> bytes:
    return json.dumps({"step": step, "files": list(files)}).encode()


def entry(path: object, data: bytes = b"weights", **changes: object) -> dict[str, object]:
    return {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}


def honest_checkpoints(store: Store, tmp_path: Path, *steps: int) -> None:
    for step in steps:
        save(tmp_path / "honest", step)
    checkpoint_sync.CheckpointUploader(store, PREFIX, "honest", tmp_path / "honest").sync()


HOSTILE_MARKERS = {
    "no JSON": (b"\xff{", "cannot be read"),
    "deep JSON": (b"[" * 100_000, "cannot be read"),
    "a huge number": (b'{"step": ' + b"9" * 5000 + b"}", "cannot be read"),
    "a list": (b"[]", "has no list of 1 to 1000 files"),
    "null": (b"null", "has no list of 1 to 1000 files"),
    "files of another kind": (b'{"step": 9, "files": {"path": "a"}}', "has no list of 1 to 1000 files"),
    "no file": (marker(9), "has no list of 1 to 1000 files"),
    "a million files": (marker(9, *[0] * 1_000_000), "is larger than"),
    "a few files too many": (marker(9, *[0] * 1001), "has no list of 1 to 1000 files"),
    "an entry of another kind": (marker(9, "weights"), "lists 'None'"),
    "another step": (marker(8, entry("weights")), "says step 8"),
    "a step that is true": (marker(True, entry("weights")), "says step True"),
    "a step with a point": (marker(9.0, entry("weights")), "says step 9.0"),
    "a path that is a number": (marker(9, entry(7)), "lists '7'"),
    "a path above": (marker(9, entry("../../../planted")), "which is no path"),
    "a path above, inside": (marker(9, entry("adapter/../../../planted")), "which is no path"),
    "an absolute path": (marker(9, entry("/tmp/planted")), "which is no path"),
    "a reserved path": (marker(9, entry(".store-lock")), "which is no path"),
    "a line break in a path": (marker(9, entry("weights\n")), "which is no path"),
    "an empty part": (marker(9, entry("a//b")), "which is no path"),
    "a long path": (marker(9, entry("a" * 300)), "which is no path"),
    "the marker itself": (marker(9, entry(checkpoints.MARKER)), "which is no path"),
    "a file twice": (marker(9, entry("weights"), entry("weights")), "lists a file twice"),
    "a size below zero": (marker(9, entry("weights", size=-1)), "has no size and sha256 of weights"),
    "a size that is text": (marker(9, entry("weights", size="7")), "has no size and sha256 of weights"),
    "another hash": (marker(9, entry("weights", sha256="0" * 64)), "another sha256"),
    "no hash": (marker(9, entry("weights", sha256=None)), "has no size and sha256 of weights"),
    "another size": (marker(9, entry("weights", size=10**15)), "weights has 7 bytes, not 1000000000000000"),
    "a file that is not there": (marker(9, entry("optimizer.pt")), "optimizer.pt is missing"),
    "a file and a folder": (marker(9, entry("weights"), entry("weights/more")), "weights/more is missing"),
}


@pytest.mark.parametrize("name", HOSTILE_MARKERS)
def test_a_checkpoint_that_nobody_here_wrote_is_passed_over_with_its_reason(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data, reason = HOSTILE_MARKERS[name]
    honest_checkpoints(store, tmp_path, 3)
    put(store, f"{PREFIX}/forged/checkpoint-9", {"weights": b"weights", checkpoints.MARKER: data}, tmp_path)
    scratch = tmp_path / "work" / "scratch"
    scratch.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))

    assert checkpoint_sync.restore(store, PREFIX, scratch) == 3
    (line,) = [line for line in capsys.readouterr().out.split("\n") if line.startswith("skipped")]
    assert line.startswith(f"skipped {PREFIX}/forged/checkpoint-9: ")
    assert reason in line
    assert len(line) < 400
    # What was written is the honest checkpoint alone, inside of the folder.
    names = ("", "/adapter.safetensors", f"/{checkpoints.MARKER}")
    assert set(tmp_path.rglob("*")) - before == {Path(f"{scratch}/checkpoint-3{name}") for name in names}


@pytest.mark.parametrize("name", ["checkpoint-" + "9" * 5000, "checkpoint-9999999999", "checkpoint-٣", "checkpoint--1"])
def test_a_step_that_no_run_has_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    # A store lists what anybody wrote; no file system has the first of these names.
    class Listing(LocalStore):
        def list(self, prefix: str) -> Iterator[Entry]:
            yield from super().list(prefix)
            yield Entry(f"{prefix}/forged/{name}/{checkpoints.MARKER}", 10)

    store = Listing((tmp_path / "store").as_uri())
    honest_checkpoints(store, tmp_path, 3)
    assert checkpoint_sync.restore(store, PREFIX, tmp_path) == 3
    assert f"skipped 1 more below {PREFIX}" in capsys.readouterr().out


def test_a_checkpoint_larger_than_the_disk_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore((tmp_path / "store").as_uri())
    honest_checkpoints(store, tmp_path, 3)
    # A file with nothing in it but a length takes no room in the store.
    size = shutil.disk_usage(tmp_path).total + 1
    put(store, f"{PREFIX}/x/checkpoint-9", {"a": b"", checkpoints.MARKER: marker(9, entry("a", size=size))}, tmp_path)
    os.truncate(tmp_path / "store" / PREFIX / "x" / "checkpoint-9" / "a", size)
    assert checkpoint_sync.restore(store, PREFIX, tmp_path) == 3
    assert f"its files have {size} bytes, and the disk has room for" in capsys.readouterr().out


def test_what_cannot_be_read_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder in the place of a file; links that lead nowhere or to themselves; a name that no store gives."""
    store = LocalStore((tmp_path / "store").as_uri())
    honest_checkpoints(store, tmp_path, 3)
    forged = tmp_path / "store" / PREFIX / "forged"
    for step in (7, 8, 9):
        (forged / f"checkpoint-{step}").mkdir(parents=True)
    (forged / "checkpoint-7" / checkpoints.MARKER).mkdir()
    (forged / "checkpoint-8" / checkpoints.MARKER).symlink_to("nowhere")
    (forged / "checkpoint-9" / "two\nlines").mkdir()
    (forged / "checkpoint-9" / "two\nlines" / checkpoints.MARKER).write_bytes(marker(9, entry("a")))
    assert checkpoint_sync.restore(store, PREFIX, tmp_path) == 3
    checkpoint_sync.remove(store, PREFIX)
    assert stored_checkpoints(store) == ["forged/checkpoint-9/two\nlines"]

    # What the file system refuses to list stops no step either, and neither does it at the end.
    (forged / "loop").symlink_to("loop")
    capsys.readouterr()
    assert checkpoint_sync.restore(store, PREFIX, tmp_path) is None
    checkpoint_sync.remove(store, PREFIX)
    output = capsys.readouterr().out
    assert f"skipped every checkpoint below {store.uri}/{PREFIX}: they cannot be listed: " in output
    assert "checkpoints not removed: " in output


def test_a_store_that_is_away_is_a_reason_to_try_again(tmp_path: Path) -> None:
    """Training from the start would lose what is there."""

    class Away(LocalStore):
        def list(self, prefix: str) -> Iterator[Entry]:
            raise TryAgain("no connection")

    with pytest.raises(TryAgain):
        checkpoint_sync.restore(Away(tmp_path.as_uri()), PREFIX, tmp_path)


def test_older_checkpoints_are_there_too_and_a_step_that_is_trained_again_is_uploaded(
    store: Store, tmp_path: Path
) -> None:
    honest_checkpoints(store, tmp_path, 2, 3)
    put(store, f"{PREFIX}/forged/checkpoint-4", {"a": b"a", checkpoints.MARKER: marker(4, entry("a", b"a"))}, tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert checkpoint_sync.restore(store, PREFIX, scratch) == 4
    assert [f.name for f in checkpoints.sorted_checkpoints(scratch)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]

    # The step cannot load the newest one, and trains its steps again.
    uploader = checkpoint_sync.CheckpointUploader(store, PREFIX, "second", scratch)
    uploader.start()
    shutil.rmtree(scratch / "checkpoint-4")
    save(scratch, 4)
    uploader.stop(sync=True)
    assert stored_checkpoints(store) == ["forged/checkpoint-4", "honest/checkpoint-3", "second/checkpoint-4"]


def test_in_a_store_with_keys_only_a_marker_that_the_trainer_signed_for_its_place_counts(
    store: Store, tmp_path: Path
) -> None:
    key_admin.create(store)
    save(tmp_path / "first", 4)
    uploader = checkpoint_sync.CheckpointUploader(store, PREFIX, "first", tmp_path / "first")
    uploader.sync()
    (tmp_path / "next").mkdir()
    assert checkpoint_sync.restore(store, PREFIX, tmp_path / "next") == 4

    # The same checkpoint for another key, which has other data: of the same shapes, and with a valid marker of its own.
    elsewhere = "scratch/train_qlora/xyz"
    pairs = [(entry.path, entry.path.replace(PREFIX, elsewhere)) for entry in store.list(PREFIX)]
    store.copy(pairs)
    (tmp_path / "other").mkdir()
    assert checkpoint_sync.restore(store, elsewhere, tmp_path / "other") is None

    # One without a signature, as anybody can write it.
    unsigned = tmp_path / "unsigned"
    save(unsigned, 5)
    store.upload(unsigned / "checkpoint-5", f"{PREFIX}/a/checkpoint-5", ["adapter.safetensors", checkpoints.MARKER])
    (tmp_path / "last").mkdir()
    assert checkpoint_sync.restore(store, PREFIX, tmp_path / "last") == 4
