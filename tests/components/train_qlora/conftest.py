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
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import components.train_qlora.step
from components.quantize_model.step import run as quantize
from components.train_qlora import preflight
from components.train_qlora import train as training
from components.train_qlora.processes import launch
from components.train_qlora.report import TrainingResult
from qlora_retrain.config.sections import AdapterStart, QuantizeConfig, TrainConfig
from tests.zygote import Zygote

SMALL: dict[str, Any] = {
    "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "micro_batch_size": 4, "global_batch_size": 8,
    "max_steps": 14, "device": "cpu", "attention": "eager", "precision": "float32",
}  # fmt: skip
PHRASES = {
    "refund": "I want my money back for order",
    "delivery": "where is the parcel of order",
    "login": "I cannot sign in to see order",
}


@pytest.fixture(autouse=True)
def train_in_test_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a single training process in the test's own, where a test can look into it and inject faults.

    Tests that start the step as a program cover what a separate process adds.
    """

    def train(config: TrainConfig, *folders: Path) -> TrainingResult:
        if config.num_processes > 1:
            return launch.launch(config, *folders)
        preflight.check_environment(config)
        return training.train(config, *folders)

    monkeypatch.setattr(components.train_qlora.step, "launch", train)


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    """Give a test the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, quantized to 4 bits."""
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def base_of(nf4: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the base of a method: in its own format, with the start of its adapter beside it where it needs one."""

    @cache
    def base(method: str, iterations: int = 5) -> Path:
        start = None
        if method in ("lora-xs", "loftq", "lq-lora"):
            start = AdapterStart(method=method, rank=4, target_modules="all-linear", iterations=iterations)
        base_format = {"qa-lora": "int4", "ir-qlora": "nf4-shifted", "lq-lora": "mixed"}.get(method, "nf4")
        if (start, base_format) == (None, "nf4"):
            return nf4
        folder = tmp_path_factory.mktemp(method)
        quantize(QuantizeConfig(format=base_format, adapter_start=start), tiny_model, folder)
        return folder

    return base


@pytest.fixture(scope="session")
def chats():
    """Make this many chats of different lengths."""

    def make(count: int) -> list[list[dict[str, Any]]]:
        conversations = []
        for i in range(count):
            intent, phrase = list(PHRASES.items())[i % 3]
            text = f"{phrase} number {1000 + i}" + " and please hurry" * (i % 5)
            conversations.append([{"role": "user", "content": text}, {"role": "assistant", "content": intent}])
        return conversations

    return make


class Step:
    """The step in a folder of its own, which can be run again and again; scratch stays between runs."""

    def __init__(self, folder: Path, dataset: Path, base_nf4: Path) -> None:
        self.dataset, self.base_nf4 = dataset, base_nf4
        self.scratch, self.adapter = folder / "scratch", folder / "adapter"
        self.scratch.mkdir(parents=True)

    def __call__(self, **settings: Any) -> dict[str, Any]:
        """Run the step and return its numbers."""
        from components.train_qlora.step import run

        # Each attempt of a pipeline gets an empty folder for its output; only scratch survives.
        shutil.rmtree(self.adapter, ignore_errors=True)
        self.adapter.mkdir()
        config = TrainConfig(**(SMALL | settings)).with_reasons({"attention": "faster on <short> rows"})
        return dict(run(config, self.dataset, self.base_nf4, self.adapter, scratch=self.scratch).numbers)

    @property
    def weights(self) -> bytes:
        return (self.adapter / "adapter_model.safetensors").read_bytes()

    @property
    def document(self) -> dict[str, Any]:
        """The content of `training.json`."""
        return dict(json.loads((self.adapter / "training.json").read_text()))


@pytest.fixture
def step(tmp_path: Path, nf4: Path, chats):
    """Make a step over this many rows, in a folder of that name; `edit` changes the text of the training rows."""

    # 44 rows are 6 steps per epoch, the last of them partial.
    def make(name: str = "run", *, train: int = 44, held_out: int = 10, edit=lambda text: text) -> Step:
        folder = tmp_path / name
        (folder / "dataset").mkdir(parents=True)
        conversations = chats(train + held_out)
        for part, subset in (("train", conversations[:train]), ("eval", conversations[train:])):
            rows = [{"id": f"{part}-{i}", "messages": turns} for i, turns in enumerate(subset)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "dataset" / f"{part}.jsonl").write_text(edit(lines) if part == "train" else lines)
        return Step(folder, folder / "dataset", nf4)

    return make


class Program:
    """The step as a program, in an operating system session of its own."""

    def __init__(
        self, step: Step, fault: str, settings: dict[str, Any], prefix: list[str], zygote: Zygote | None
    ) -> None:
        step.adapter.mkdir(exist_ok=True)
        start = zygote.popen if zygote else subprocess.Popen
        # A session of its own, so that a test can tell which processes belong to the step.
        arguments: dict[str, Any] = {n: str(getattr(step, n)) for n in ("dataset", "base_nf4", "adapter", "scratch")}
        arguments["config"] = SMALL | settings
        self.process = start(
            [*prefix, sys.executable, str(Path(__file__).with_name("program.py")), json.dumps(arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={
                **os.environ, "FAULT": fault, "FORKED": "1" if zygote else "", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
        )  # fmt: skip

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end, and return exit code, stdout and stderr; no process of the session may be left."""
        stdout, stderr = self.process.communicate(timeout=300)
        assert not self.leftover_processes()
        return self.process.returncode, stdout, stderr

    def leftover_processes(self) -> list[str]:
        """Return the session's processes that are still there 100 s after its end, zombies not counted."""
        deadline = time.monotonic() + 100
        while (names := self.session_processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return list(names.values())

    def session_processes(self) -> dict[int, str]:
        """Return the names of the session's processes, by their ids."""
        names = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, fields = stat.read_text().rpartition(")")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # proc(5): state, parent, process group and session follow the name, which may contain spaces.
            state, _, _, session = fields.split()[:4]
            if int(session) == self.process.pid and state != "Z":
                names[int(stat.parent.name)] = name
        return names


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Iterator[Callable[..., Program]]:
    """Start the step as a program of its own; `prefix` are words to put before its command.

    A `fresh` one is executed, and spawns its training processes; any other is forked from the zygote, as they are.
    """
    programs: list[Program] = []

    def start(
        step: Step, fault: str = ":", *, prefix: Sequence[str] = (), fresh: bool = False, **settings: Any
    ) -> Program:
        # Not everything survives a fork: a limit beside what is imported, what the end of an interpreter runs.
        is_fresh = fresh or bool(prefix) or fault.startswith(("limit", "late"))
        zygote = None if is_fresh else request.getfixturevalue("zygote")
        programs.append(Program(step, fault, settings, list(prefix), zygote))
        return programs[-1]

    yield start

    # A failed test must not leave a training run behind.
    for running in programs:
        running.process.kill()
        running.process.communicate()


@pytest.fixture
def small_disk() -> Callable[[Path, str], AbstractContextManager[None]]:
    """Mount a real file system of this size on a folder, for as long as the block lasts."""

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
