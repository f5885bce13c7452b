"""The pipeline without an orchestrator: order, retries and exit codes, with real processes that do little work.

`tests/e2e` runs the real steps without an orchestrator.
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
from types import SimpleNamespace

import pytest

from qlora_retrain.core import graph, signals
from qlora_retrain.core.errors import describe
from qlora_retrain.pipeline import make_plan, run_endings, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes import local
from qlora_retrain.storage import open_store

# The program of every step. It completes an artifact of one file, or ends as its script says for its n-th try.
STEP = """
import inspect, json, os, signal, subprocess, sys, time
from pathlib import Path
from qlora_retrain.core import graph
from qlora_retrain.pipeline import execute
from qlora_retrain.core.errors import DataRefused
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline.plan import Plan

folder, name, uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
step = graph.step(name)
tries = folder / f"{name}.tries"
with tries.open("a") as stream:
    stream.write("x")
script = json.loads((folder / "script.json").read_text()).get(name, [])
number = len(tries.read_text()) - 1
ending = script[number] if number < len(script) else 0
(folder / f"{name}.began").write_text(str(time.monotonic()))

def run(**arguments):
    if ending == "refuse":
        return StepResult(refused=DataRefused("bad rows"))
    if ending == "wait":
        (folder / f"{name}.waits").touch()
        time.sleep(600)
    # Until another step has begun, whichever of the two the machine starts first.
    while ending == "meet" and not list(folder.glob("*_model.began")):
        time.sleep(0.05)
    time.sleep(0.3)
    (arguments[step.makes] / "made.txt").write_text(name)
    return StepResult({"rows": 3})

extra = ["plan", "store"] if step.kind == "publish" else ["scratch"] if step.scratch else []
names = ["config", *(i.name for i in step.reads), step.makes, *extra]
run.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
if isinstance(ending, int) and ending < 0:
    os.kill(os.getpid(), -ending)
if ending == "nothing":
    sys.exit(0)
if ending == "litter":
    litter = subprocess.Popen(["sleep", "3600"])
    (folder / f"{name}.litter").write_text(str(litter.pid))
if isinstance(ending, int) and ending:
    sys.exit(ending)
code = execute.run_step(Plan.load(uri), name, lambda: run).code
(folder / f"{name}.ended").write_text(str(time.monotonic()))
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def own_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `local.run` does to this process's signal handlers."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals, "_requested", False)
    yield
    signal.signal(signal.SIGTERM, handler)


class ScriptedSteps:
    """Steps that follow a script; their folder records how often and when each of them ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "step.py").write_text(STEP)
        self.script()

    def script(self, **endings: list[object]) -> None:
        """Set how each try of a step ends (an exit code, -signal or a word); forget the tries so far."""
        (self.folder / "script.json").write_text(json.dumps(endings))
        for path in self.folder.glob("*.tries"):
            path.unlink()

    def command(self, step: str, uri: str) -> list[str]:
        return [sys.executable, str(self.folder / "step.py"), str(self.folder), step, uri]

    def try_count(self, step: str) -> int:
        path = self.folder / f"{step}.tries"
        return len(path.read_text()) if path.exists() else 0

    def time_of(self, step: str, event: str) -> float:
        return float((self.folder / f"{step}.{event}").read_text())


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedSteps:
    (tmp_path / "steps").mkdir()
    steps = ScriptedSteps(tmp_path / "steps")
    monkeypatch.setattr(local, "step_command", steps.command)
    return steps


@pytest.fixture
def plan(line: Path, root_uri: str) -> Plan:
    return make_plan.make_plan(line, root_uri)


def test_the_command_is_the_one_of_every_runtime() -> None:
    assert local.step_command("publish", "file:///x/plan.json")[1:] == [
        "-m",
        "components.publish",
        "--plan",
        "file:///x/plan.json",
    ]


@pytest.mark.slow
def test_steps_run_after_what_they_read_side_by_side_where_they_can_and_never_twice(
    steps: ScriptedSteps, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.script(validate_data=["meet"])
    assert local.run(plan) == 0
    assert [steps.try_count(s.name) for s in graph.STEPS] == [1] * 6

    for upstream_step, downstream_step in graph.edges():
        assert steps.time_of(upstream_step, "ended") <= steps.time_of(downstream_step, "began")
    assert steps.time_of("quantize_model", "began") < steps.time_of("validate_data", "ended")

    steps.script()
    assert local.run(plan) == 0
    assert [steps.try_count(s.name) for s in graph.STEPS] == [0] * 6
    assert capsys.readouterr().out.count("made already: outcome done") == 6


def test_a_run_until_a_step_runs_what_that_step_needs_and_no_more(steps: ScriptedSteps, plan: Plan) -> None:
    assert local.run(plan, until="quantize_model") == 0
    assert [steps.try_count(s.name) for s in graph.STEPS] == [0, 1, 0, 0, 0, 0]
    assert local.run(plan, until="train_qlora") == 0
    assert [steps.try_count(s.name) for s in graph.STEPS] == [1, 1, 1, 0, 0, 0]


def test_a_step_that_says_try_again_or_was_killed_is_tried_again(steps: ScriptedSteps, plan: Plan) -> None:
    steps.script(train_qlora=[75, -9, 0], quantize_model=[137], evaluate=[12])
    assert local.run(plan) == 12
    assert (steps.try_count("train_qlora"), steps.try_count("quantize_model"), steps.try_count("evaluate")) == (3, 2, 1)


def test_how_a_step_was_killed_is_kept_in_the_runs_folder(steps: ScriptedSteps, plan: Plan) -> None:
    steps.script(validate_data=[-9] * 9)
    assert local.run(plan) == 137
    ending = run_endings.read(open_store(plan.root), plan.run_id, "validate_data")
    assert ending is not None
    assert (ending.code, ending.kind) == (137, "retry")


@pytest.mark.parametrize("exit_code", [1, 12, 13, 14])
def test_a_step_that_would_fail_again_is_not_tried_again(
    steps: ScriptedSteps, plan: Plan, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.script(train_qlora=[exit_code])
    assert local.run(plan) == exit_code
    assert (steps.try_count("train_qlora"), steps.try_count("evaluate")) == (1, 0)
    assert (
        f"stopped at train_qlora: {describe(exit_code)} ({exit_code}); logs: {plan.root}/runs/"
        in capsys.readouterr().out
    )


def test_a_step_is_tried_as_often_as_the_graph_says(
    steps: ScriptedSteps, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.script(validate_data=[75] * 9)
    real_sleep = time.sleep
    monkeypatch.setattr(local.time, "sleep", lambda seconds: real_sleep(min(seconds, 0.05)))
    assert local.run(plan) == 75
    assert steps.try_count("validate_data") == graph.step("validate_data").retries + 1


def test_a_refusal_stops_the_run_with_its_code_now_and_again(
    steps: ScriptedSteps, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.script(validate_data=["refuse"])
    assert local.run(plan) == 10
    assert steps.try_count("train_qlora") == 0
    assert local.run(plan) == 10
    assert steps.try_count("validate_data") == 1
    assert "data refused (10): as before: bad rows" in capsys.readouterr().out


def test_a_step_that_only_says_it_is_done_is_our_bug(
    steps: ScriptedSteps, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.script(validate_data=["nothing"])
    assert local.run(plan) == 1
    assert "exited with 0, but its dataset is not in the store" in capsys.readouterr().out


def test_what_a_step_leaves_running_goes_with_it(steps: ScriptedSteps, plan: Plan) -> None:
    steps.script(validate_data=["litter"], train_qlora=[12])
    assert local.run(plan) == 12
    litter = int((steps.folder / "validate_data.litter").read_text())
    wait_until(lambda: not is_running(litter))


def test_a_failure_stops_the_step_beside_it(steps: ScriptedSteps, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE_SECONDS", 5.0)
    steps.script(validate_data=[12], quantize_model=["wait"])
    assert local.run(plan) == 12
    assert not running_pids(steps)
    assert status.exit_code(plan, "quantize_model") is None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_step_behind(steps: ScriptedSteps, plan: Plan, signum: signal.Signals) -> None:
    steps.script(validate_data=["wait"], quantize_model=["wait"])
    # In a process of its own, since the signal would end the tests.
    program = (
        "import sys\nfrom qlora_retrain.pipeline.plan import Plan\nfrom qlora_retrain.runtimes import local\n"
        f"start = {steps.command('', '')[:-2]!r}\nlocal.step_command = lambda step, uri: [*start, step, uri]\n"
        "sys.exit(local.run(Plan.load(sys.argv[1])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, plan.uri], stdout=subprocess.PIPE, text=True)

    wait_until(lambda: steps.try_count("validate_data") + steps.try_count("quantize_model") == 2)
    wait_until(lambda: len(running_pids(steps)) == 4)  # two steps and their supervisors
    # Not only started: a signal that comes while a library is imported can be lost there.
    wait_until(lambda: len(list(steps.folder.glob("*.waits"))) == 2)
    process.send_signal(signum)
    process.wait(120)
    if signum != signal.SIGKILL:
        assert process.returncode == 130

    wait_until(lambda: not running_pids(steps))
    assert process.stdout is not None
    process.stdout.close()


def running_pids(steps: ScriptedSteps) -> list[int]:
    """List the processes that run these steps, and their supervisors."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(steps.folder / "step.py") in arguments:
            pids.append(int(entry.parent.name))
    return pids


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_step_that_takes_longer_than_it_may_is_stopped_and_not_tried_again(
    steps: ScriptedSteps, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.script(validate_data=["wait"], quantize_model=["wait"])

    # A clock that jumps as soon as the step works, since a slow machine may take any time to that point.
    def monotonic() -> float:
        return time.monotonic() + 3600 * (steps.folder / "validate_data.waits").exists()

    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    assert local.run(plan, until="validate_data", max_step_hours=0.5) == 12
    assert (steps.folder / "validate_data.ended").exists(), "it had the time to save its work"
    assert steps.try_count("validate_data") == 1
    ending = run_endings.read(open_store(plan.root), plan.run_id, "validate_data")
    assert ending is not None
    assert (ending.code, ending.retry) == (12, False)
    assert "raise runtime.max_step_hours" in ending.reason
