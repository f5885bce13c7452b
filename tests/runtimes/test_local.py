"""The pipeline without an orchestrator: order, retries and endings, with real processes that do little work.

`tests/e2e` runs the real steps this way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_retrain.core import graph, signals
from qlora_retrain.pipeline import execute, plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes import local

# A step of any name: writes one file through the real runner, or ends as the script for its n-th try says.
STEP = """
import inspect, json, os, signal, subprocess, sys, time
from pathlib import Path
from qlora_retrain.core import graph
from qlora_retrain.pipeline import execute as runner
from qlora_retrain.core.errors import DataRefused
from qlora_retrain.core.outcome import Report
from qlora_retrain.pipeline.plan import Plan

folder, name, uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
step = graph.step(name)
tries = folder / f"{name}.tries"
with tries.open("a") as stream:
    stream.write("x")
script = json.loads((folder / "script.json").read_text()).get(name, [])
number = len(tries.read_text()) - 1
ending = script[number] if number < len(script) else 0
(folder / f"{name}.began").write_text(str(time.time()))

def run(**arguments):
    if ending == "refuse":
        return Report(refused=DataRefused("bad rows"))
    if ending == "wait":
        time.sleep(60)
    time.sleep(0.3)
    (arguments[step.makes] / "made.txt").write_text(name)
    return Report({"rows": 3})

extra = ["plan", "store"] if step.store else ["scratch"] if step.scratch else []
names = ["config", *(i.name for i in step.reads), step.makes, *extra]
run.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
if isinstance(ending, int) and ending < 0:
    os.kill(os.getpid(), -ending)
if ending == "nothing":
    sys.exit(0)
if ending == "litter":
    subprocess.Popen(["sleep", "60"])
if isinstance(ending, int) and ending:
    sys.exit(ending)
code = runner.execute(Plan.load(uri), name, lambda: run)
(folder / f"{name}.ended").write_text(str(time.time()))
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def own_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals, "_requested", False)
    yield
    signal.signal(signal.SIGTERM, before)


class Bench:
    """A folder in which steps do as they are told and note when they did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "step.py").write_text(STEP)
        self.script()

    def script(self, **endings: list[object]) -> None:
        (self.folder / "script.json").write_text(json.dumps(endings))
        for path in self.folder.glob("*.tries"):
            path.unlink()

    def command(self, step: str, uri: str) -> list[str]:
        return [sys.executable, str(self.folder / "step.py"), str(self.folder), step, uri]

    def tries(self, step: str) -> int:
        path = self.folder / f"{step}.tries"
        return len(path.read_text()) if path.exists() else 0

    def at(self, step: str, what: str) -> float:
        return float((self.folder / f"{step}.{what}").read_text())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "bench").mkdir()
    found = Bench(tmp_path / "bench")
    monkeypatch.setattr(local, "command", found.command)
    return found


@pytest.fixture
def made(line: Path, root_uri: str) -> Plan:
    return plan.make(line, root_uri)


def test_the_command_is_the_one_of_every_runtime() -> None:
    assert local.command("publish", "file:///x/plan.json")[1:] == [
        "-m",
        "components.publish",
        "--plan",
        "file:///x/plan.json",
    ]


@pytest.mark.slow
def test_steps_run_after_what_they_read_side_by_side_where_they_can_and_never_twice(
    bench: Bench, made: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local.run(made) == 0
    assert [bench.tries(s.name) for s in graph.STEPS] == [1] * 6
    for before, after in graph.edges():
        assert bench.at(before, "ended") <= bench.at(after, "began")
    assert bench.at("quantize_model", "began") < bench.at("validate_data", "ended")
    bench.script()
    assert local.run(made) == 0
    assert [bench.tries(s.name) for s in graph.STEPS] == [0] * 6
    assert capsys.readouterr().out.count("made already: outcome done") == 6


def test_a_step_that_says_try_again_or_was_killed_is_tried_again(bench: Bench, made: Plan) -> None:
    bench.script(train_qlora=[75, -9, 0], quantize_model=[137], evaluate=[12])
    assert local.run(made) == 12
    assert (bench.tries("train_qlora"), bench.tries("quantize_model"), bench.tries("evaluate")) == (3, 2, 1)


@pytest.mark.parametrize("code", [1, 12, 13, 14])
def test_a_step_that_would_fail_again_is_not_tried_again(
    bench: Bench, made: Plan, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.script(train_qlora=[code])
    assert local.run(made) == code
    assert (bench.tries("train_qlora"), bench.tries("evaluate")) == (1, 0)
    assert (
        f"stopped at train_qlora: {execute.describe(code)} ({code}); logs: {made.root}/runs/" in capsys.readouterr().out
    )


def test_a_step_is_tried_as_often_as_the_graph_says(bench: Bench, made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.script(validate_data=[75] * 9)
    slept = time.sleep
    monkeypatch.setattr(local.time, "sleep", lambda seconds: slept(min(seconds, 0.05)))
    assert local.run(made) == 75
    assert bench.tries("validate_data") == graph.step("validate_data").retries + 1


def test_a_refusal_stops_the_run_with_its_code_now_and_again(
    bench: Bench, made: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.script(validate_data=["refuse"])
    assert local.run(made) == 10
    assert bench.tries("train_qlora") == 0
    assert local.run(made) == 10
    assert bench.tries("validate_data") == 1
    assert "data refused (10): as before: bad rows" in capsys.readouterr().out


def test_a_step_that_only_says_it_is_done_is_our_bug(
    bench: Bench, made: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.script(validate_data=["nothing"])
    assert local.run(made) == 1
    assert "ended as if done, but its dataset is not there" in capsys.readouterr().out


def test_what_a_step_leaves_running_goes_with_it(bench: Bench, made: Plan) -> None:
    bench.script(validate_data=["litter"], train_qlora=[12])
    clock = time.monotonic()
    assert local.run(made) == 12
    assert time.monotonic() - clock < 40


def test_a_failure_stops_the_step_beside_it(bench: Bench, made: Plan) -> None:
    bench.script(validate_data=[12], quantize_model=["wait"])
    clock = time.monotonic()
    assert local.run(made) == 12
    assert time.monotonic() - clock < 30
    assert execute.found(made, "quantize_model") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_step_behind(bench: Bench, made: Plan, number: signal.Signals) -> None:
    bench.script(validate_data=["wait"], quantize_model=["wait"])
    program = (
        "import sys\nfrom qlora_retrain.pipeline.plan import Plan\nfrom qlora_retrain.runtimes import local\n"
        f"start = {bench.command('', '')[:-2]!r}\nlocal.command = lambda step, uri: [*start, step, uri]\n"
        "sys.exit(local.run(Plan.load(sys.argv[1])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, made.uri], stdout=subprocess.PIPE, text=True)
    until(lambda: bench.tries("validate_data") + bench.tries("quantize_model") == 2)
    until(lambda: len(steps_of(bench)) == 4)  # each and its leash
    time.sleep(1.0)  # their handlers are there
    process.send_signal(number)
    process.wait(30)
    if number != signal.SIGKILL:
        assert process.returncode == 130
    until(lambda: not steps_of(bench))
    assert process.stdout is not None
    process.stdout.close()


def steps_of(bench: Bench) -> list[int]:
    """The processes that run this bench's steps, and their leashes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(bench.folder / "step.py") in words:
            found.append(int(entry.parent.name))
    return found


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
