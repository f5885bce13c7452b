"""The whole pipeline through its command line, on a tiny random model, with real steps, processes and stores."""

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

from tests.zygote import Zygote

LINE = {
    "line": "tiny",
    "data": {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 10, "micro_batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"allow_first_release": True, "min_gain_over_base": 0.1, "bootstrap_samples": 500},
    # These tests are about the mechanics: a random model's 16-bit and 4-bit forms hardly differ.
    "merge": {"max_loss_increase_nats": 0.5, "min_prompts": 10},
}


@dataclass(frozen=True)
class CompletedCommand:
    """The exit code and the output of a command."""

    exit_code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Project:
    """A folder with a line's YAML and a store, and methods that run the command line on them."""

    folder: Path
    environment: dict[str, str]
    zygote: Zygote | None  # None: programs are executed, as people's are

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def root(self) -> str:
        return (self.folder / "store").as_uri()

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "qlora_retrain.cli", *map(str, arguments)]

    def cli(self, *arguments: object, timeout: float = 400) -> CompletedCommand:
        with self._popen(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return CompletedCommand(process.returncode, stdout, stderr)

    def run(self, *arguments: object, root: str | None = None) -> CompletedCommand:
        return self.cli("run", self.config, "--root", root or self.root, *arguments)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return self._popen(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def _popen(self, *arguments: object, **streams: int) -> subprocess.Popen[str]:
        start = self.zygote.popen if self.zygote else subprocess.Popen
        return start(self.command(*arguments), env=self.environment, text=True, **streams)


@pytest.fixture(scope="session")
def make_project(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    write_tickets: Callable[[Path, int], Path],
) -> Callable[..., Project]:
    """Make a project; keyword arguments are sections to change, e.g. `train={"max_steps": 3}`.

    The programs of a `fresh` one are executed, as people's are; those of any other are forked from the zygote.
    """
    cache = tmp_path_factory.mktemp("cache")

    def make(*, rows: int = 300, fresh: bool = False, **changes: dict[str, object]) -> Project:
        folder = tmp_path_factory.mktemp("project")
        write_tickets(folder / "tickets.jsonl", rows)

        # A setting that is given replaces one of LINE; the other settings of its section stay.
        document = {**LINE, "sources": {"raw_data": "tickets.jsonl", "base_model": str(tiny_model)}}
        for section, values in changes.items():
            document[section] = {**document.get(section, {}), **values}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
        environment = {**os.environ, "QLORA_RETRAIN_CACHE": str(cache)}
        return Project(folder, environment, None if fresh else request.getfixturevalue("zygote"))

    return make


@pytest.fixture(scope="session")
def published(make_project: Callable[..., Project]) -> Project:
    """Make a project whose first run published and promoted a version; its programs are started as people do."""
    project = make_project(fresh=True)
    result = project.run()
    assert result.exit_code == 0, result.text
    return project


@pytest.fixture(scope="session")
def kill_tree() -> Callable[[int], None]:
    """SIGKILL a process and all its descendants, so that none can save anything."""

    def kill(pid: int) -> None:
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
        ).stdout.split()
        # The children first: once their parent is dead, they cannot be found through it.
        for child in children:
            kill(int(child))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    return kill
