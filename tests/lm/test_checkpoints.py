"""Checkpoints count only when they are complete; every harm is named."""

import json
from pathlib import Path

import pytest

from qlora_retrain.lm import checkpoints


def save_checkpoint(scratch: Path, step: int) -> Path:
    folder = scratch / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(b"weights %d" % step)
    (folder / "inner" / "rng.pth").write_bytes(b"state")
    checkpoints.write_marker(folder, step)
    return folder


def test_a_completed_checkpoint_verifies(tmp_path):
    folder = save_checkpoint(tmp_path, 7)
    assert checkpoints.invalid_reason(folder) is None
    marker = json.loads((folder / checkpoints.MARKER).read_text())
    assert marker["step"] == 7
    assert [f["path"] for f in marker["files"]] == ["adapter.safetensors", "inner/rng.pth"]
    assert not list(folder.glob("*.part"))


def test_a_folder_without_its_marker_was_cut_off(tmp_path):
    folder = save_checkpoint(tmp_path, 7)
    (folder / checkpoints.MARKER).rename(folder / f"{checkpoints.MARKER}.part")
    assert "cut off" in checkpoints.invalid_reason(folder)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "adapter.safetensors").write_bytes(b"weights 8"), "another sha256"),
        (lambda f: (f / "adapter.safetensors").write_bytes(b"wei"), "3 bytes where 9"),
        (lambda f: (f / "adapter.safetensors").unlink(), "is missing"),
        (lambda f: (f / "optimizer.pt").write_bytes(b"a pickle"), "optimizer.pt is not in"),
        (lambda f: (f / checkpoints.MARKER).write_text("{"), "cannot be read"),
        (lambda f: (f / checkpoints.MARKER).write_text('{"step": 7}'), "cannot be read"),
        (lambda f: (f / checkpoints.MARKER).write_text("[]"), "cannot be read"),
    ],
)
def test_a_harmed_checkpoint_is_refused_with_the_reason(tmp_path, harm, reason):
    folder = save_checkpoint(tmp_path, 7)
    harm(folder)
    assert reason in checkpoints.invalid_reason(folder)


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 7)
    # The link leads to the very bytes, so only its kind gives it away.
    elsewhere = tmp_path / "elsewhere"
    (folder / "adapter.safetensors").rename(elsewhere)
    (folder / "adapter.safetensors").symlink_to(elsewhere)
    assert "no plain file" in checkpoints.invalid_reason(folder)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 7).rename(tmp_path / "checkpoint-70")
    assert "says step 7" in checkpoints.invalid_reason(folder)


def test_the_newest_is_by_number_and_only_what_verifies_counts(tmp_path, capsys):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step)

    # The highest step is damaged, the next one was cut off, and a name without a number is none of ours.
    (tmp_path / "checkpoint-100" / "adapter.safetensors").write_bytes(b"weights 9999")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.newest_valid(tmp_path) == tmp_path / "checkpoint-10"
    log = capsys.readouterr().out
    assert "skipped checkpoint-100: adapter.safetensors has 12 bytes" in log
    assert "skipped checkpoint-11: has no _complete.json" in log


def test_an_empty_scratch_has_no_checkpoint(tmp_path):
    assert checkpoints.newest_valid(tmp_path) is None
