"""A checkpoint whose hashes are right, and which no run of this recipe wrote: passed over, and it runs no code."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.train_qlora import history, resume
from components.train_qlora import train as training
from components.train_qlora import trainer as trainer_module
from components.train_qlora.data import load_tokenized_dataset
from components.train_qlora.trainer import AdapterTrainer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import chat, checkpoints
from tests.components.train_qlora.conftest import SMALL

SETTINGS: dict[str, Any] = {"max_steps": 5, "num_evals": 2, "checkpoint_minutes": 1e-9}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the first test fills with the scratch and the adapter of a whole run."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def stopped(step, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The step over a scratch folder with honest checkpoints of steps 3 and 4 of 5."""
    run = step("parts")
    if not any(saved.iterdir()):
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "MAX_CHECKPOINTS", 5)
            run(**SETTINGS)
        shutil.copytree(run.scratch, saved / "scratch")
        shutil.copytree(run.adapter, saved / "adapter")
    shutil.copytree(saved / "scratch", run.scratch, dirs_exist_ok=True)
    for number in (1, 2, 5):
        shutil.rmtree(run.scratch / f"checkpoint-{number}")
    return run


@pytest.fixture
def whole_weights(stopped: Any, saved: Path) -> bytes:
    """The weights of the run that nothing stopped."""
    return (saved / "adapter" / "adapter_model.safetensors").read_bytes()


def build_trainer(run: Any, **settings: Any) -> AdapterTrainer:
    tokenizer = chat.load_tokenizer(run.base_nf4)
    datasets = [
        load_tokenized_dataset(run.dataset / f"{part}.jsonl", tokenizer, "answers") for part in ("train", "eval")
    ]
    config = TrainConfig(**(SMALL | SETTINGS | settings))
    return training._build_trainer(config, *datasets, run.base_nf4, tokenizer.pad_token_id, run.scratch)


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return forge


def edit_torch(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        document = torch.load(folder / name, weights_only=False)
        change(document)
        torch.save(document, folder / name)

    return forge


def edit_weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return forge


def compress(folder: Path) -> None:
    with zipfile.ZipFile(folder / "optimizer.pt") as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(folder / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def first(tensors: dict[str, Any]) -> Any:
    return next(iter(tensors))


def quantized(document: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = document["state"][0]["__bnb_optimizer_quant_state__"]
    return tensors


STATE, WEIGHTS, BEST = "trainer_state.json", "adapter/adapter_model.safetensors", "best/adapter_model.safetensors"
FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that the Trainer would load": (lambda f: (f / "scaler.pt").write_bytes(b"x"), "has scaler.pt"),
    "code": (lambda f: (f / "modeling.py").write_bytes(b"x"), "has modeling.py"),
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), "has no optimizer.pt"),
    "no adapter": (lambda f: shutil.rmtree(f / "adapter"), "has no adapter/adapter_config.json"),
    "no best weights": (lambda f: shutil.rmtree(f / "best"), "the best weights so far: expected True, found False"),
    "a state of another shape": (lambda f: (f / STATE).write_text("[1]"), "its fields"),
    "a deep state": (lambda f: (f / STATE).write_text("[" * 100_000), "RecursionError"),
    "a large state": (lambda f: (f / STATE).write_text(" " * 2_000_000), "too many for 4 steps"),
    "a field more": (edit_json(STATE, lambda s: s.update(more=1)), "its fields"),
    "another step": (edit_json(STATE, lambda s: s.update(global_step=3)), "global_step: expected 4, found 3"),
    "a run of another length": (edit_json(STATE, lambda s: s.update(max_steps=9)), "max_steps: expected 5, found 9"),
    "a file of this machine": (edit_json(STATE, lambda s: s.update(best_model_checkpoint="/etc")), "best_model"),
    "a callback": (edit_json(STATE, lambda s: s.update(stateful_callbacks=[])), "stateful_callbacks is no object"),
    "a log that lacks a step": (edit_json(STATE, lambda s: s["log_history"].pop(0)), "the steps in its log"),
    "a log of text": (edit_json(STATE, lambda s: s["log_history"][0].update(loss="<b>")), "no finite number"),
    "a log that is no list": (edit_json(STATE, lambda s: s.update(log_history=7)), "cannot be loaded: TypeError"),
    "no speed": (edit_json(STATE, lambda s: s["log_history"][0].update(tokens_per_second=0)), "has no speed at step 1"),
    "evaluations that were not due": (
        edit_json(STATE, lambda s: s["log_history"].insert(0, {"eval_loss": 1, "step": 1, "epoch": 1, "time": 1})),
        "evaluations at steps at which this run has none",
    ),
    "weights of another model": (edit_weights(WEIGHTS, lambda w: w.pop(first(w))), "the tensors of adapter/"),
    "weights of another shape": (
        edit_weights(WEIGHTS, lambda w: w.update({first(w): torch.zeros(8, 8)})), "found torch.float32 (8, 8)",
    ),
    "weights of another type": (
        edit_weights(BEST, lambda w: w.update({first(w): w[first(w)].half()})), "found torch.float16",
    ),
    "weights that are no number": (edit_weights(WEIGHTS, lambda w: w[first(w)].fill_(torch.inf)), "is not finite"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 100), "cannot be loaded: SafetensorError"),
    "weights of any size": (lambda f: os.truncate(f / WEIGHTS, 10**7), "model.safetensors has 10000000 bytes"),
    "an optimizer of any size": (lambda f: os.truncate(f / "optimizer.pt", 10**7), "optimizer.pt has 10000000 bytes"),
    "no file of torch's": (lambda f: (f / "optimizer.pt").write_bytes(b"x" * 100), "cannot be loaded: BadZipFile"),
    "compressed parts": (compress, "optimizer.pt has compressed parts"),
    "another learning rate": (
        edit_torch("optimizer.pt", lambda o: o["param_groups"][0].update(lr=0.9)), "optimizer.pt: param_groups"
    ),
    "another decay": (
        edit_torch("optimizer.pt", lambda o: o["param_groups"][0].update(weight_decay=0.5)),
        "optimizer.pt: param_groups",
    ),
    "another schedule": (edit_torch("scheduler.pt", lambda s: s.update(base_lrs=[0.9, 0.9])), "scheduler.pt"),
    "a schedule that begins again": (edit_torch("scheduler.pt", lambda s: s.update(last_epoch=0)), "scheduler.pt"),
    "fewer states": (edit_torch("optimizer.pt", lambda o: o["state"].pop(0)), "its parameters"),
    "another count": (edit_torch("optimizer.pt", lambda o: o["state"][0].update(step=99)), "the count of parameter 0"),
    "an optimizer of another kind": (
        edit_torch("optimizer.pt", lambda o: quantized(o).update(momentum_buffer=torch.zeros(4))), "parameter 0",
    ),
    "an optimizer of 8 bits": (
        edit_torch("optimizer.pt", lambda o: quantized(o).update(state1=quantized(o)["state1"].to(torch.uint8))),
        "expected torch.float32",
    ),
    "an optimizer's state that is no number": (
        edit_torch("optimizer.pt", lambda o: quantized(o)["state1"].fill_(torch.nan)), "is not finite",
    ),
    "random numbers of another kind": (edit_torch("rng_state.pth", lambda r: r.update(python=7)), "cannot be loaded"),
    "a large generator": (lambda f: (f / "rng_state.pth").write_bytes(b"x" * 2_000_000), "more than 1048576"),
}  # fmt: skip


def test_every_forgery_is_named_and_honest_checkpoints_are_not(stopped: Any, tmp_path: Path) -> None:
    trainer, honest = build_trainer(stopped), stopped.scratch / "checkpoint-4"
    assert resume.unusable_reason(trainer, honest) is None
    assert resume.unusable_reason(trainer, stopped.scratch / "checkpoint-3") is None
    # The check leaves the trainer as it was.
    assert trainer.optimizer is None
    assert trainer.lr_scheduler is None

    for name, (forge, reason) in FORGERIES.items():
        folder = tmp_path / name / "checkpoint-4"
        shutil.copytree(honest, folder)
        forge(folder)
        checkpoints.write_marker(folder, 4)
        assert checkpoints.invalid_reason(folder) is None, name
        assert reason in str(resume.unusable_reason(trainer, folder)), name


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_runs_no_code(stopped: Any, tmp_path: Path, name: str) -> None:
    folder, trace = stopped.scratch / "checkpoint-4", tmp_path / "trace"
    torch.save({"state": Payload(trace), "param_groups": []}, folder / name)
    checkpoints.write_marker(folder, 4)
    assert "UnpicklingError" in str(resume.unusable_reason(build_trainer(stopped), folder))
    assert not trace.exists()
    # It would have run.
    torch.load(folder / name, weights_only=False)
    assert trace.exists()


def test_what_cannot_be_loaded_is_passed_over_for_the_next_older_one(
    stopped: Any, whole_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = stopped.scratch / "checkpoint-4"
    edit_weights(WEIGHTS, lambda weights: weights.pop(first(weights)))(newest)
    checkpoints.write_marker(newest, 4)
    # A checkpoint beyond the end of the run is one more.
    shutil.copytree(newest, stopped.scratch / "checkpoint-900")
    checkpoints.write_marker(stopped.scratch / "checkpoint-900", 900)

    numbers = stopped(**SETTINGS)
    output = capsys.readouterr().out
    assert "skipped checkpoint-900: is of step 900, and the run has 5\n" in output
    assert "skipped checkpoint-4: the tensors of adapter/adapter_model.safetensors: expected" in output
    assert "resuming from checkpoint-3 of 5 steps" in output
    assert stopped.weights == whole_weights
    assert (numbers["resumed_at"], numbers["trained_steps"], numbers["steps"]) == (3, 2, 5)
    assert "2 of the steps were trained by the last attempt" in (stopped.adapter / "report.html").read_text()


def test_where_no_checkpoint_can_be_loaded_training_begins_at_the_start(
    stopped: Any, whole_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in checkpoints.sorted_checkpoints(stopped.scratch):
        (folder / "optimizer.pt").write_bytes(b"nothing of torch's")
        checkpoints.write_marker(folder, checkpoints.step_of(folder))
    numbers = stopped(**SETTINGS)
    assert capsys.readouterr().out.count("cannot be loaded: BadZipFile") == 2
    assert stopped.weights == whole_weights
    assert (numbers["resumed_at"], numbers["trained_steps"]) == (0, 5)


def test_an_attempt_that_trained_no_step_says_so(stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(**SETTINGS)
    # A forged final checkpoint that fits this run in every way, with a loss that nobody measured.
    final = stopped.scratch / "checkpoint-5"
    edit_json(STATE, lambda state: [entry.update(loss=0.001) for entry in state["log_history"] if "loss" in entry])(
        final
    )
    checkpoints.write_marker(final, 5)
    capsys.readouterr()

    numbers = stopped(**SETTINGS)
    assert numbers["train_loss"] == pytest.approx(0.001)
    assert (numbers["resumed_at"], numbers["trained_steps"], numbers["steps"]) == (5, 0, 5)
    assert {name: stopped.document[name] for name in ("resumed_at", "trained_steps")} == {
        "resumed_at": 5,
        "trained_steps": 0,
    }
    assert "no step was trained: the adapter, and every loss but the evaluation's, are checkpoint-5's" in (
        capsys.readouterr().out
    )
    assert "0 of the steps were trained by the last attempt" in (stopped.adapter / "report.html").read_text()


def test_an_attempt_that_begins_again_within_itself_counts_all_that_it_trained(tmp_path: Path) -> None:
    # After memory ran out, the training process resumes from a checkpoint of the same attempt.
    history.begin_attempt(tmp_path)
    history.note_first_step(tmp_path, 3)
    history.note_first_step(tmp_path, 8)
    assert history.first_step(tmp_path) == 3
    history.begin_attempt(tmp_path)
    history.note_first_step(tmp_path, 9)
    assert history.first_step(tmp_path) == 9
