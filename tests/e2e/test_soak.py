"""Long loops: a run that is killed again and again ends complete, and publishes nothing wrong on the way."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLS = 25


@pytest.mark.soak
def test_a_run_killed_again_and_again_ends_whole(make_project: Callable, kill_tree: Callable[[int], None]) -> None:
    uninterrupted = make_project(train={"checkpoint_minutes": 0.01})
    assert uninterrupted.run().exit_code == 0
    expected = adapter(uninterrupted.folder / "store")
    project, random_numbers = make_project(train={"checkpoint_minutes": 0.01}), random.Random(0)
    kills = 0
    while kills < KILLS:
        process = project.start("run", project.config, "--root", project.root)
        try:
            output, _ = process.communicate(timeout=random_numbers.uniform(1, 20))
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.communicate()
            kills += 1
            assert_store_is_consistent(project.folder / "store")
        else:
            assert_whole(project, process.returncode, output)
            assert adapter(project.folder / "store") == expected
            # It ended before the kill; go on with another run.
            project = make_project(train={"checkpoint_minutes": 0.01})
    result = project.run()
    assert_whole(project, result.exit_code, result.text)
    assert adapter(project.folder / "store") == expected


def assert_whole(project: Any, exit_code: int, output: str) -> None:
    """Check that the last run succeeded, and that the kills before it left nothing wrong and no second version."""
    store = project.folder / "store"
    assert exit_code == 0, output
    assert_store_is_consistent(store)
    assert len(list((store / "models/tiny/versions").glob("*/manifest.json"))) == 1
    assert not list(store.rglob("checkpoint-*"))


def adapter(store: Path) -> str:
    """Return the sha256 of the trained weights."""
    (path,) = store.glob("artifacts/adapter/*/_manifest.json")
    files = json.loads(path.read_text())["files"]
    return str(next(file["sha256"] for file in files if file["path"] == "adapter_model.safetensors"))


def assert_store_is_consistent(store: Path) -> None:
    """Check that every manifest's files exist with their bytes, and that every alias names a complete version."""
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
