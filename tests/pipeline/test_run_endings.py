"""A step's last act: the same document on stdout, in the termination log, in a file and in the run's folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core import endings, signals
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, DataRefused, TryAgain
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import code_identity, execute, explain, run_endings, run_page, step_main
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage.store import Store

pytestmark = pytest.mark.usefixtures("own_signal_handlers")
ENDING = Ending(10, Cause.DATA_REFUSED, "half of the rows are bad", "validate_data", "ab" * 32, "attempt-1")


def test_an_ending_is_written_everywhere_that_it_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "termination-log"
    log.write_text("")
    monkeypatch.setattr(run_endings, "TERMINATION_LOG", log)
    run_endings.write(ENDING, root=store.uri, run_id="r1", ending_to=tmp_path / "kfp" / "ending")

    documents = [
        capsys.readouterr().out.removeprefix(f"\n{endings.MARK}"),
        log.read_text(),
        (tmp_path / "kfp" / "ending").read_text(),
        store.read("runs/r1/endings/validate_data.json").data.decode(),
    ]
    assert [endings.from_json(document) for document in documents] == [ENDING] * 4
    assert run_endings.read(store, "r1", "validate_data") == ENDING


def test_the_marked_line_begins_a_line_whatever_a_library_printed_before(capsys: pytest.CaptureFixture[str]) -> None:
    print("a progress bar without its line break", end="")
    run_endings.write(ENDING, root=None, run_id=None)
    assert endings.last_ending(capsys.readouterr().out.split("\n")) == ENDING


def test_a_signal_in_the_last_act_does_not_change_how_the_step_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Log:
        def is_file(self) -> bool:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            return False

    signals.install(graceful=False)
    monkeypatch.setattr(run_endings, "TERMINATION_LOG", Log())
    run_endings.write(ENDING, root=None, run_id=None, ending_to=tmp_path / "ending")
    assert endings.from_json((tmp_path / "ending").read_text()) == ENDING


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    is_released = threading.Event()
    monkeypatch.setattr(run_endings, "open_store", lambda root: is_released.wait(60))
    monkeypatch.setattr(run_endings, "_STORE_SECONDS", 0.1)
    assert not run_endings.write_to_store("s3://bucket/store", "r1", ENDING)
    is_released.set()


def test_without_a_termination_log_none_is_made(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_endings, "TERMINATION_LOG", tmp_path / "none")
    run_endings.write(ENDING, root=None, run_id=None)
    assert not (tmp_path / "none").exists()


def test_a_place_that_cannot_be_written_costs_nothing_but_itself(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run_endings.write(ENDING, root="file:///proc/none", run_id="r1", ending_to=tmp_path / "file" / "below")
    assert endings.from_output(capsys.readouterr().out) == ENDING


def failing(error: Exception) -> Callable[[], Callable[..., StepResult]]:
    def run(
        config: object,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        raise error

    return lambda: run


def test_the_pages_of_a_run_say_how_a_step_failed_until_it_begins_again(
    made_plan: Plan, store: Store, small_steps: dict[str, Callable[..., StepResult]]
) -> None:
    ending = execute.run_step(made_plan, "validate_data", failing(TryAgain("busy", cause=Cause.THROTTLED)))
    run_endings.write_to_store(made_plan.root, made_plan.run_id, ending)
    assert "validate_data: try again (75): busy" in run_page.sentence(made_plan)
    assert "not made  try again (75): busy" in explain.status_text(made_plan)

    assert execute.run_step(made_plan, "validate_data", lambda: small_steps["validate_data"]).code == 0
    assert run_endings.read(store, made_plan.run_id, "validate_data") is None
    assert "busy" not in explain.status_text(made_plan)


def test_the_page_of_a_run_says_how_far_a_step_is(made_plan: Plan, store: Store, tmp_path: Path) -> None:
    assert "last report" not in run_page.page(made_plan)
    (tmp_path / "train_qlora.json").write_text('{"what": "training", "done": 30, "total": 300, "loss": 0.41}')
    store.upload(tmp_path, f"runs/{made_plan.run_id}/status", ["train_qlora.json"])
    assert "last report: training 30/300  loss 0.41" in run_page.page(made_plan)
    # How it failed says more than how far it came.
    failure = Ending(75, Cause.THROTTLED, "busy", "train_qlora")
    run_endings.write_to_store(made_plan.root, made_plan.run_id, failure)
    assert "last report" not in run_page.page(made_plan)


def test_a_refusal_names_its_attempt_and_its_key(made_plan: Plan) -> None:
    def refuse(
        config: object,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        return StepResult(refused=DataRefused("half of the rows are bad"))

    ending = execute.run_step(made_plan, "validate_data", lambda: refuse)
    assert (ending.code, ending.kind, ending.cause) == (10, "refused", "data_refused")
    assert ending.reason == "half of the rows are bad"
    assert ending.key == made_plan.step("validate_data").key
    assert ending.attempt


def test_a_bug_outside_the_step_has_an_ending_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["publish", "--plan", "file:///none/plan.json"])
    monkeypatch.setattr(Plan, "load", lambda uri: {}["a bug"])
    with pytest.raises(SystemExit) as caught:
        step_main.main("publish", lambda: lambda **arguments: StepResult())
    ending = endings.from_output(capsys.readouterr().out)
    assert ending is not None
    assert (caught.value.code, ending.code, ending.cause) == (1, 1, "bug")


@pytest.mark.parametrize("arguments", [["--plan", "file:///none/plan.json"], ["--plan", "ftp://x/y"]])
def test_the_last_line_of_a_steps_output_is_its_ending_also_without_a_plan(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "components.publish", *arguments],
        capture_output=True,
        text=True,
        cwd=code_identity.project_root(),
    )
    last = done.stdout.splitlines()[-1]
    ending = endings.from_line(last)
    assert ending is not None
    assert (ending.code, ending.kind, ending.cause, ending.step) == (12, "error", "usage", "publish")
    assert json.loads(last.removeprefix(endings.MARK))["retry"] is False
