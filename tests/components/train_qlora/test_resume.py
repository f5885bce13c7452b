"""A checkpoint whose hashes are right, and which no run of this recipe wrote: passed over, and it runs no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from components.train_qlora import checkpoint, history
from components.train_qlora.data import read_rows
from components.train_qlora.optimizer import AdapterOptimizer, learning_rate
from components.train_qlora.training_run import TrainingRun, build_run
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import checkpoints
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
            patch.setattr(checkpoint, "MAX_CHECKPOINTS", 5)
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


def build(run: Any, **settings: Any) -> TrainingRun:
    """Return the run that the step would begin."""
    config = TrainConfig(**(SMALL | SETTINGS | settings))
    rows = read_rows(config, run.dataset, run.base_nf4)
    return build_run(config, rows, run.base_nf4, run.scratch, lambda *_: None)


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return forge


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return forge


def first(tensors: dict[str, Any]) -> Any:
    return next(iter(tensors))


STATE, OPTIMIZER, RANDOM = "state.json", "optimizer.safetensors", "random_0.safetensors"
WEIGHTS, BEST = "adapter/adapter_model.safetensors", "best/adapter_model.safetensors"
FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (lambda f: (f / "optimizer.pt").write_bytes(b"x"), "has optimizer.pt, which this trainer never"),
    "code": (lambda f: (f / "modeling.py").write_bytes(b"x"), "has modeling.py"),
    "no optimizer": (lambda f: (f / OPTIMIZER).unlink(), "has no optimizer.safetensors"),
    "no random state": (lambda f: (f / RANDOM).unlink(), "has no random_0.safetensors"),
    "no adapter": (lambda f: shutil.rmtree(f / "adapter"), "has no adapter/adapter_config.json"),
    "no best weights": (lambda f: shutil.rmtree(f / "best"), "the best weights so far: expected True, found False"),
    "a state of another shape": (lambda f: (f / STATE).write_text("[1]"), "its fields"),
    "a deep state": (lambda f: (f / STATE).write_text("[" * 100_000), "RecursionError"),
    "a large state": (lambda f: (f / STATE).write_text(" " * 2_000_000), "too many for 4 steps"),
    "a field more": (edit_json(STATE, lambda s: s.update(more=1)), "its fields"),
    "another step": (edit_json(STATE, lambda s: s.update(step=3)), "step: expected 4, found 3"),
    "a step of another kind": (edit_json(STATE, lambda s: s.update(step=True)), "step: expected 4, found True"),
    "a run of another length": (edit_json(STATE, lambda s: s.update(total_steps=9)), "expected 5, found 9"),
    "a log that lacks a step": (edit_json(STATE, lambda s: s["log"].pop(0)), "the steps in its log"),
    "a log of text": (edit_json(STATE, lambda s: s["log"][0].update(loss="<b>")), "no finite number"),
    "a log that is no list": (edit_json(STATE, lambda s: s.update(log=7)), "cannot be loaded: TypeError"),
    "no speed": (edit_json(STATE, lambda s: s["log"][0].update(tokens_per_second=0)), "has no speed at step 1"),
    "evaluations that were not due": (
        edit_json(STATE, lambda s: s["log"].insert(0, {"eval_loss": 1, "step": 1, "epoch": 1, "time": 1})),
        "evaluations at steps at which this run has none",
    ),
    "weights of another model": (edit_tensors(WEIGHTS, lambda w: w.pop(first(w))), "the tensors of adapter/"),
    "weights of another shape": (
        edit_tensors(WEIGHTS, lambda w: w.update({first(w): torch.zeros(8, 8)})), "found torch.float32 (8, 8)",
    ),
    "weights of another type": (
        edit_tensors(BEST, lambda w: w.update({first(w): w[first(w)].half()})), "found torch.float16",
    ),
    "weights that are no number": (edit_tensors(WEIGHTS, lambda w: w[first(w)].fill_(torch.inf)), "is not finite"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 100), "cannot be loaded: SafetensorError"),
    "weights of any size": (lambda f: os.truncate(f / WEIGHTS, 10**7), "model.safetensors has 10000000 bytes"),
    "an optimizer of any size": (lambda f: os.truncate(f / OPTIMIZER, 10**7), "has 10000000 bytes, more than"),
    "a pickle under a safe name": (lambda f: torch.save({}, f / OPTIMIZER), "cannot be loaded: SafetensorError"),
    "fewer moments": (edit_tensors(OPTIMIZER, lambda t: t.pop(first(t))), "the tensors of optimizer.safetensors"),
    "a moment more": (
        edit_tensors(OPTIMIZER, lambda t: t.update(momentum=torch.zeros(4))), "the tensors of optimizer.safetensors",
    ),
    "moments of 8 bits": (
        edit_tensors(OPTIMIZER, lambda t: t.update({first(t): t[first(t)].to(torch.uint8)})), "expected torch.float32",
    ),
    "moments that are no number": (edit_tensors(OPTIMIZER, lambda t: t[first(t)].fill_(torch.nan)), "is not finite"),
    "a generator of another size": (
        edit_tensors(RANDOM, lambda t: t.update(cpu=torch.zeros(8, dtype=torch.uint8))), "random_0.safetensors: cpu",
    ),
    "a generator in no state": (edit_tensors(RANDOM, lambda t: t["cpu"].fill_(255)), "cannot be loaded: RuntimeError"),
    "a large generator": (lambda f: os.truncate(f / RANDOM, 2_000_000), "has 2000000 bytes, more than"),
}  # fmt: skip


def test_every_forgery_is_named_and_honest_checkpoints_are_not(stopped: Any, tmp_path: Path) -> None:
    run, honest = build(stopped), stopped.scratch / "checkpoint-4"
    assert checkpoint.unusable_reason(run, honest) is None
    assert checkpoint.unusable_reason(run, stopped.scratch / "checkpoint-3") is None
    # The check leaves the run as it was.
    assert (run.step, run.log, run.optimizer.state()) == (0, [], {})

    for name, (forge, reason) in FORGERIES.items():
        folder = tmp_path / name / "checkpoint-4"
        shutil.copytree(honest, folder)
        forge(folder)
        checkpoints.write_marker(folder, 4)
        assert checkpoints.invalid_reason(folder) is None, name
        assert reason in str(checkpoint.unusable_reason(run, folder)), name


@pytest.mark.parametrize("bits", [8, 32])
def test_an_optimizer_goes_on_where_its_state_was_saved(bits: int) -> None:
    """Two optimizers, one of which gets the other's state halfway, change the same weights by the same gradients."""
    config = TrainConfig(optimizer=f"paged_adamw_{bits}bit", device="cpu", weight_decay=0.1)
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128)) for _ in range(2)]
    whole, resumed = (AdapterOptimizer(config, [("layer.weight", weight)]) for weight in weights)
    gradients = torch.randn(6, 64, 128, generator=torch.Generator().manual_seed(0))
    for i, gradient in enumerate(gradients):
        weights[0].grad = gradient.clone()
        whole.step(1e-2)
        if i == 2:
            saved = {name: tensor.clone() for name, tensor in whole.state().items()}
            assert {n: (t.dtype, t.shape) for n, t in saved.items()} == {
                n: (t.dtype, t.shape) for n, t in resumed.empty_state().items()
            }
            weights[1].data.copy_(weights[0].data)
            resumed.load_state(saved, 3)
        if i > 2:
            weights[1].grad = gradient.clone()
            resumed.step(1e-2)
    assert len(saved) == {8: 4, 32: 2}[bits]
    assert torch.equal(*weights)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(
    ("warmup", "warmup_steps"),
    [
        ({}, 4),  # 3 % of 101 steps, rounded up
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_ratio": 0.5}, 51),
        ({"warmup_steps": 0}, 0),
        ({"warmup_steps": 20}, 20),
    ],
)
def test_the_learning_rates_are_those_of_transformers(schedule: Any, warmup: dict[str, Any], warmup_steps: int) -> None:
    config, total_steps = TrainConfig(schedule=schedule, **warmup), 101
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    reference = get_scheduler(name, optimizer, warmup_steps, total_steps)
    for number in range(total_steps):
        assert learning_rate(config, number, total_steps) == reference.get_last_lr()[0]
        optimizer.step()
        reference.step()


def test_what_cannot_be_loaded_is_passed_over_for_the_next_older_one(
    stopped: Any, whole_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = stopped.scratch / "checkpoint-4"
    edit_tensors(WEIGHTS, lambda weights: weights.pop(first(weights)))(newest)
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
        (folder / OPTIMIZER).write_bytes(b"no tensors")
        checkpoints.write_marker(folder, checkpoints.step_of(folder))
    numbers = stopped(**SETTINGS)
    assert capsys.readouterr().out.count("cannot be loaded: SafetensorError") == 2
    assert stopped.weights == whole_weights
    assert (numbers["resumed_at"], numbers["trained_steps"]) == (0, 5)


def test_an_attempt_that_trained_no_step_says_so(stopped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(**SETTINGS)
    # A forged final checkpoint that fits this run in every way, with a loss that nobody measured.
    final = stopped.scratch / "checkpoint-5"
    edit_json(STATE, lambda state: [entry.update(loss=0.001) for entry in state["log"] if "loss" in entry])(final)
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
