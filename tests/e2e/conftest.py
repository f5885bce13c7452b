"""The whole pipeline through its command line, on a tiny random model: real steps, real subprocesses, a real store."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

LINE = {
    "line": "tiny",
    "data": {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 10, "batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"first_release": True, "min_gain_over_base": 0.1, "bootstrap_samples": 500},
    # A random model's 16-bit and 4-bit forms hardly differ; the limit is about the mechanics here.
    "merge": {"max_loss_nats": 0.5, "min_rows": 10},
}


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Project:
    """A folder with a line's YAML, a store, and the command line to use them."""

    folder: Path
    environment: dict[str, str]

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def root(self) -> str:
        return (self.folder / "store").as_uri()

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "qlora_retrain.cli", *map(str, arguments)]

    def cli(self, *arguments: object, timeout: float = 400) -> Ended:
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def run(self, *arguments: object, root: str | None = None) -> Ended:
        return self.cli("run", self.config, "--root", root or self.root, *arguments)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture(scope="session")
def make_project(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_tickets: Callable[[Path, int], Path]
) -> Callable[..., Project]:
    """Make a project; keyword arguments are sections to change, e.g. `train={"max_steps": 3}`."""
    cache = tmp_path_factory.mktemp("cache")

    def make(*, rows: int = 300, **changes: dict[str, object]) -> Project:
        folder = tmp_path_factory.mktemp("project")
        write_tickets(folder / "tickets.jsonl", rows)
        document = {**LINE, "sources": {"raw_data": "tickets.jsonl", "base_model": str(tiny_model)}}
        for section, values in changes.items():
            document[section] = {**document.get(section, {}), **values}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
        environment = {**os.environ, "QLORA_RETRAIN_CACHE": str(cache)}
        return Project(folder, environment)

    return make


@pytest.fixture(scope="session")
def published(make_project: Callable[..., Project]) -> Project:
    """A project whose first run published a version and promoted it."""
    project = make_project()
    ended = project.run()
    assert ended.code == 0, ended.text
    return project


@pytest.fixture(scope="session")
def kill_tree() -> Callable[[int], None]:
    """SIGKILL a process and everything below it, so that nothing gets a chance to save."""

    def kill(pid: int) -> None:
        below = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
        for child in below:
            kill(int(child))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    return kill
