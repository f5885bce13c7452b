"""A step that is interrupted: its checkpoints outlive it, it says so, and its command line refuses in one line."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import Diverged, IntegrityError, TryAgain
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import checkpoint_sync, code_identity, execute
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage.store import Store

Steps = dict[str, Callable[..., StepResult]]
RunAll = Callable[[Plan], dict[str, int]]

pytestmark = pytest.mark.usefixtures("own_signal_handlers")


def stored(store: Store, prefix: str) -> set[str]:
    return {e.path for e in store.list(prefix)}


def execute_steps(plan: Plan, steps: Steps, *names: str) -> None:
    for name in names:
        assert execute.run_step(plan, name, lambda name=name: steps[name]).code == 0  # type: ignore[misc]


def checkpoint(folder: Path, step: int) -> None:
    from qlora_retrain.lm import checkpoints

    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "state.bin").write_text(f"state {step}")
    checkpoints.write_marker(folder / f"checkpoint-{step}", step)


def test_training_goes_on_from_the_newest_checkpoint_and_leaves_none_when_done(
    made_plan: Plan, small_steps: Steps, store: Store
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    checkpoints_seen: list[list[str]] = []

    def run(
        config: Any, dataset: Path, base_nf4: Path, champion_adapter: Any, adapter: Path, *, scratch: Path
    ) -> StepResult:
        checkpoints_seen.append(sorted(p.name for p in scratch.iterdir()))
        (adapter / "adapter_model.safetensors").write_text("x")
        if len(checkpoints_seen) < 3:
            checkpoint(scratch, len(checkpoints_seen))
            (scratch / "checkpoint-9").mkdir()  # never completed: it must not travel
            raise TryAgain("preempted")
        return StepResult()

    codes = [execute.run_step(made_plan, "train_qlora", lambda: run).code for _ in range(3)]
    assert codes == [75, 75, 0]
    assert checkpoints_seen == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert stored(store, "scratch") == set()


def test_a_signal_that_a_library_took_for_damage_is_still_a_signal(
    made_plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Any, base_model: Path, base_nf4: Path) -> StepResult:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise IntegrityError("its weights do not fit its config.json") from error
        return StepResult()

    assert execute.run_step(made_plan, "quantize_model", lambda: run).code == 75
    assert "quantize_model: try again (75): stopped; run the same command again" in capsys.readouterr().err


def test_a_checkpoint_with_a_flipped_byte_is_passed_over(
    made_plan: Plan, small_steps: Steps, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    checkpoints_seen: list[list[str]] = []

    def run(
        config: Any, dataset: Path, base_nf4: Path, champion_adapter: Any, adapter: Path, *, scratch: Path
    ) -> StepResult:
        checkpoints_seen.append(sorted(p.name for p in scratch.iterdir()))
        if len(checkpoints_seen) < 2:
            checkpoint(scratch, 1)
            checkpoint(scratch, 2)
            raise TryAgain("preempted")
        return StepResult()

    assert execute.run_step(made_plan, "train_qlora", lambda: run).code == 75
    (spoiled,) = (tmp_path / "store").glob("scratch/train_qlora/*/*/checkpoint-2/state.bin")
    spoiled.write_text("State 2")
    assert execute.run_step(made_plan, "train_qlora", lambda: run).code == 0
    assert checkpoints_seen[1] == ["checkpoint-1"]
    assert "skipped" in capsys.readouterr().out


def test_an_uploader_that_fails_at_the_end_hides_neither_success_nor_the_cause(
    made_plan: Plan, small_steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute_steps(made_plan, small_steps, "validate_data", "quantize_model")

    def unreachable(self: checkpoint_sync.CheckpointUploader) -> None:
        raise TryAgain("the store is away")

    monkeypatch.setattr(checkpoint_sync.CheckpointUploader, "sync", unreachable)

    def diverging(
        config: Any, dataset: Path, base_nf4: Path, champion_adapter: Any, adapter: Path, *, scratch: Path
    ) -> StepResult:
        raise Diverged("NaN")

    assert execute.run_step(made_plan, "train_qlora", lambda: diverging).code == 14
    assert execute.run_step(made_plan, "train_qlora", lambda: small_steps["train_qlora"]).code == 0


# --- signals, in a process of their own

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from qlora_retrain.core import signals
from qlora_retrain.pipeline import execute
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline.plan import Plan

def validate_data(
    config, raw_data, base_model, golden_data, reference_profile, eval_data, evaluation_history, replay_data,
    reference_data, dataset,
):
    (dataset / "half").write_text("half")
    print("working", flush=True)
    time.sleep(600)

def train_qlora(config, dataset, base_nf4, champion_adapter, adapter, *, scratch):
    print("working", flush=True)
    for _ in range(6000):
        time.sleep(0.1)
        if signals.stop_requested():
            print("saved", flush=True)
            raise TryAgain("stopped after a checkpoint")

step = sys.argv[2]
sys.exit(execute.run_step(Plan.load(sys.argv[1]), step, lambda: globals()[step]).code)
"""


def test_a_step_whose_library_swallows_the_request_to_stop_makes_nothing(
    made_plan: Plan, small_steps: Steps, store: Store, own_signal_handlers: None
) -> None:
    run = small_steps["validate_data"]

    @functools.wraps(run)
    def swallow(**arguments: Any) -> StepResult:
        # A library's `except Exception` around a callback of ours.
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return run(**arguments)

    assert execute.run_step(made_plan, "validate_data", lambda: swallow).code == 75
    assert not list(store.children("artifacts"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", ["validate_data", "train_qlora"])
def test_a_step_that_is_asked_to_stop_says_try_again(
    made_plan: Plan, small_steps: Steps, store: Store, node_cache: Path, step: str, number: signal.Signals
) -> None:
    if step == "train_qlora":
        execute_steps(made_plan, small_steps, "validate_data", "quantize_model")
    before = stored(store, "artifacts")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, made_plan.uri, step], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for row in process.stdout:
        if row == "working\n":
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert "try again (75)" in err
    assert ("saved" in out) == (step == "train_qlora")
    assert "Traceback" not in err
    assert stored(store, "artifacts") == before
    assert not list((node_cache / "work").iterdir())
    assert any("working" in store.read(p).data.decode() for p in stored(store, f"runs/{made_plan.run_id}/logs"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "components.publish", *arguments],
        capture_output=True,
        text=True,
        cwd=code_identity.project_root(),
    )


def test_the_command_line_of_a_step_refuses_in_one_line_with_the_code_of_the_table(tmp_path: Path) -> None:
    for arguments in (["--plan"], [], ["--plan", (tmp_path / "none.json").as_uri()], ["--plan", "ftp://x/y"]):
        done = command(*arguments)
        assert done.returncode == 12, done
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--line", "mails"], "expected a plan of line mails, found one of intents"),
        (["--root", "file:///elsewhere"], "expected a plan in file:///elsewhere"),
        (["--alias", "staging"], "moves the alias production, and staging may be moved"),
        (["--alias", ""], "moves the alias production, and no alias may be moved"),
    ],
)
def test_a_steps_command_line_refuses_a_plan_of_another_line_store_or_alias(
    made_plan: Plan, store: Store, options: list[str], fault: str
) -> None:
    command = [sys.executable, "-m", "components.publish", "--plan", made_plan.uri, *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=code_identity.project_root())
    assert ended.returncode == 13
    assert fault in ended.stderr
    assert not list(store.children(f"runs/{made_plan.run_id}/endings"))
