"""Long loops: a run that is killed again and again ends whole, and publishes nothing false on the way."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

KILLS = 25


@pytest.mark.soak
def test_a_run_killed_again_and_again_ends_whole(make_project: Callable, kill_tree: Callable[[int], None]) -> None:
    project = make_project(train={"checkpoint_minutes": 0.01})
    store, moments = project.folder / "store", random.Random(0)
    for _ in range(KILLS):
        process = project.start("run", project.config, "--root", project.root)
        try:
            process.communicate(timeout=moments.uniform(1, 30))
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.communicate()
        assert_nothing_false(store)
    ended = project.run()
    assert ended.code == 0, ended.text
    assert_nothing_false(store)
    assert len(list((store / "models/tiny/versions").glob("*/manifest.json"))) == 1


def assert_nothing_false(store: Path) -> None:
    """Every manifest's files are there, byte by byte; every alias names a whole version."""
    for path in store.glob("artifacts/*/*/_manifest.json"):
        manifest = json.loads(path.read_text())
        assert_files(path.parent / manifest["attempt"], manifest["files"])
    for path in store.glob("models/*/versions/*/manifest.json"):
        assert_files(path.parent, json.loads(path.read_text())["files"])
    for path in store.glob("models/*/aliases/*.json"):
        assert (path.parents[1] / "versions" / json.loads(path.read_text())["version"] / "manifest.json").is_file()


def assert_files(folder: Path, files: list[dict[str, str]]) -> None:
    for file in files:
        assert hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest() == file["sha256"]
