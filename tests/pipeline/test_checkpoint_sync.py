"""Checkpoints of several attempts in a store: how many are kept, and which."""

from __future__ import annotations

from pathlib import Path

from qlora_retrain.lm import checkpoints
from qlora_retrain.pipeline import checkpoint_sync
from qlora_retrain.storage.store import Store

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
        uploader.start(restored)
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
