"""The tiny model in 4 bits, quantized by the step that quantizes, and rows of different lengths over three intents."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import components.train_qlora.step
from components.quantize_model.step import run as quantize
from components.train_qlora import processes, training
from components.train_qlora.result import Trained
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig

SMALL: dict[str, Any] = {
    "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "batch_size": 4, "gradient_accumulation": 2,
    "max_steps": 14, "device": "cpu", "attention": "eager", "precision": "float32",
}  # fmt: skip
PHRASES = {
    "refund": "I want my money back for order",
    "delivery": "where is the parcel of order",
    "login": "I cannot sign in to see order",
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one process trains in this one, where a test can look into it and put faults in.

    What a process of its own adds is for the tests that start the step as a program.
    """

    def train(config: TrainConfig, *places: Path) -> Trained:
        if config.processes > 1:
            return processes.train_apart(config, *places)
        training.refuse_what_is_not_here(config)
        return training.train(config, *places)

    monkeypatch.setattr(components.train_qlora.step, "train_apart", train)


@pytest.fixture(scope="session")
def nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def chats():
    """So many chats of different lengths."""

    def made(count: int) -> list[list[dict[str, Any]]]:
        found = []
        for i in range(count):
            intent, phrase = list(PHRASES.items())[i % 3]
            text = f"{phrase} number {1000 + i}" + " and please hurry" * (i % 5)
            found.append([{"role": "user", "content": text}, {"role": "assistant", "content": intent}])
        return found

    return made


class Step:
    """The step in a folder of its own, run as often as one likes; scratch stays."""

    def __init__(self, folder: Path, dataset: Path, base_nf4: Path) -> None:
        self.dataset, self.base_nf4 = dataset, base_nf4
        self.scratch, self.adapter = folder / "scratch", folder / "adapter"
        self.scratch.mkdir(parents=True)

    def __call__(self, **settings: Any) -> dict[str, Any]:
        from components.train_qlora.step import run

        shutil.rmtree(self.adapter, ignore_errors=True)
        self.adapter.mkdir()
        config = TrainConfig(**(SMALL | settings)).with_reasons({"attention": "faster on <short> rows"})
        return dict(run(config, self.dataset, self.base_nf4, self.adapter, scratch=self.scratch).numbers)

    @property
    def weights(self) -> bytes:
        return (self.adapter / "adapter_model.safetensors").read_bytes()

    @property
    def papers(self) -> dict[str, Any]:
        return dict(json.loads((self.adapter / "training.json").read_text()))


@pytest.fixture
def step(tmp_path: Path, nf4: Path, chats):
    """Make a step over so many rows, in a folder of that name."""

    def made(name: str = "run", *, train: int = 44, held_out: int = 10, mark=lambda text: text) -> Step:
        folder = tmp_path / name
        (folder / "dataset").mkdir(parents=True)
        found = chats(train + held_out)
        for part, some in (("train", found[:train]), ("eval", found[train:])):
            lines = "".join(json.dumps({"messages": turns}) + "\n" for turns in some)
            (folder / "dataset" / f"{part}.jsonl").write_text(mark(lines) if part == "train" else lines)
        return Step(folder, folder / "dataset", nf4)

    return made


class Program:
    """The step as a program, in a session of its own."""

    def __init__(self, step: Step, fault: str, settings: dict[str, Any], before: list[str]) -> None:
        step.adapter.mkdir(exist_ok=True)
        given: dict[str, Any] = {n: str(getattr(step, n)) for n in ("dataset", "base_nf4", "adapter", "scratch")}
        given["config"] = SMALL | settings
        self.process = subprocess.Popen(
            [*before, sys.executable, str(Path(__file__).with_name("program.py")), json.dumps(given)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={
                **os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
        )  # fmt: skip

    def ended(self) -> tuple[int, str, str]:
        """Exit code and what it said; nothing of its session is left."""
        said, errors = self.process.communicate(timeout=300)
        assert not self.left()
        return self.process.returncode, said, errors

    def left(self) -> list[str]:
        """The processes of its session that are there, zombies not counted, a moment after its end."""
        until = time.monotonic() + 10
        while (found := self.session()) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def session(self) -> list[str]:
        """The names of the processes of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = stat.read_text().rpartition(")")
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, _, _, session = rest.split()[:4]
            if int(session) == self.process.pid and state != "Z":
                found.append(name)
        return found


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    """Start the step as a program of its own; `before` are the words before its command."""
    started: list[Program] = []

    def start(step: Step, fault: str = ":", *, before: Sequence[str] = (), **settings: Any) -> Program:
        started.append(Program(step, fault, settings, list(before)))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def small_disk() -> Callable[[Path, str], AbstractContextManager[None]]:
    """Make a folder a real file system of a size, for as long as it lasts."""

    @contextmanager
    def mounted(folder: Path, size: str) -> Iterator[None]:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    return mounted
