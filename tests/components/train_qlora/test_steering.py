"""Before and between the steps: the first check, measurements on the way, the best adapter, ends that come early."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from components.train_qlora import history, lora, preflight, watch
from components.train_qlora import trainer as trainer_module
from components.train_qlora.loss import summed_loss
from components.train_qlora.rows import Rows
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import Diverged, TryAgain, UsageError
from qlora_retrain.lm import chat, checkpoints, loading


@pytest.fixture
def evaluation_losses(monkeypatch: pytest.MonkeyPatch):
    """Have the measurements on the way find these losses."""

    def arrange(*losses: float) -> None:
        found = iter(losses)
        monkeypatch.setattr(trainer_module, "mean_loss", lambda *_: next(found))

    return arrange


def test_a_short_run_says_that_the_first_check_is_skipped(step, capsys):
    step()(max_steps=1)
    assert "preflight: skipped: its " in capsys.readouterr().out


@pytest.fixture
def long_run(monkeypatch: pytest.MonkeyPatch):
    """The first check may cost any share of a run, so that a short one has it too."""
    monkeypatch.setattr(preflight, "SHARE", 1e9)


def test_the_first_check_learns_a_few_rows_and_changes_nothing_of_the_run(step, monkeypatch, capsys):
    plain, checked = step("plain"), step("checked")
    plain(max_steps=2)
    monkeypatch.setattr(preflight, "SHARE", 1e9)
    checked(max_steps=2)
    said = capsys.readouterr().out
    assert "preflight: 8 rows, loss " in said
    assert checked.weights == plain.weights


def test_the_first_check_ends_early_when_the_rows_are_learnt(step, long_run, capsys):
    step()(max_steps=1, learning_rate=2e-2, rank=16, alpha=32)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight: 8 rows"))
    first, last, steps = float(line.split()[4]), float(line.split()[6]), int(line.split()[8])
    assert last < 0.1 * first
    assert steps < 40


def test_the_first_check_keeps_no_more_than_the_run_would(step, long_run, monkeypatch, capsys):
    """Passes of as many rows as fit, and layers computed twice where the run computes them twice."""
    seen: list[tuple[int, int]] = []

    def looked_at(model: Any, batch: Any) -> torch.Tensor:
        kept = 0

        def note(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = summed_loss(model, batch)
        seen.append((len(batch["input_ids"]), kept))
        return loss

    monkeypatch.setattr(preflight, "summed_loss", looked_at)
    found = {}
    for name, settings in {
        "whole": {"batch_size": 8, "gradient_accumulation": 1},
        "cut": {"batch_size": 2, "gradient_accumulation": 4},
        "twice": {"batch_size": 8, "gradient_accumulation": 1, "gradient_checkpointing": 1},
    }.items():
        seen.clear()
        step(name)(max_steps=1, **settings)
        found[name] = max(rows for rows, _ in seen), max(kept for _, kept in seen)
    assert (found["whole"][0], found["cut"][0], found["twice"][0]) == (8, 2, 8)
    assert found["cut"][1] < found["whole"][1] / 2
    assert found["twice"][1] < found["whole"][1] / 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight: 8 rows")]
    assert len(lines) == 3
    assert len(set(lines)) == 1, "the same loss, however it is cut"


def test_a_run_that_would_learn_nothing_is_refused_before_it_begins(step, long_run):
    run = step()
    with pytest.raises(UsageError, match=r"shown 40 times.*learning_rate \(1e-09\).*mask.*template.*tokenizer"):
        run(learning_rate=1e-9)
    assert not checkpoints.found(run.scratch)


def test_the_first_check_spends_at_most_a_twentieth_of_the_run(nf4, chats, capsys, monkeypatch):
    tokenizer = chat.load_tokenizer(nf4)
    encoded = [chat.encode(tokenizer, turns) for turns in chats(44)]
    rows = Rows([{"input_ids": e.input_ids, "labels": e.input_ids} for e in encoded])
    config = TrainConfig(batch_size=4, gradient_accumulation=2, device="cpu")
    model = lora.attach_new(loading.load_nf4(nf4, dtype="float32"), config)
    spent = 41 * sum(sorted(rows.lengths)[:8])
    enough = math.ceil(spent / 0.05 / (8 * sum(rows.lengths) / 44))
    preflight.overfit(model, config, rows, 0, enough - 1)
    assert f"preflight: skipped: its {spent} tokens are more than 5% of the run's" in capsys.readouterr().out
    shown = []
    monkeypatch.setattr(preflight, "LEARNT", 0.0)  # so that all steps are made
    monkeypatch.setattr(
        preflight,
        "summed_loss",
        lambda model, batch: shown.append(batch["attention_mask"]) or summed_loss(model, batch),
    )
    preflight.overfit(model, config, rows, 0, enough)
    assert "in 40 steps" in capsys.readouterr().out
    assert sum(int(mask.sum()) for mask in shown) == spent


@pytest.mark.parametrize(("last", "learnt"), [(0.99, False), (0.97, True)])
def test_a_fall_that_is_more_than_rounding_is_one(step, long_run, monkeypatch, last, learnt):
    """As with a small learning rate: nobody says that the rows are to be known by heart after 40 steps."""
    monkeypatch.setattr(preflight, "_losses", lambda *_: [1.0, *[last] * 40])
    if learnt:
        step()(max_steps=1)
    else:
        with pytest.raises(UsageError, match=r"went from 1\.000 to no less than 0\.990"):
            step()(max_steps=1)


def test_the_adapter_that_is_kept_is_the_best_one_measured(step, evaluation_losses):
    best, whole = step("best"), step("whole")
    evaluation_losses(3.0, 1.0, 2.0)
    numbers = best(max_steps=6, evaluations=3, schedule="constant", warmup=0.0)
    assert numbers["best_step"] == 4
    assert best.papers["evaluation_losses"] == [[2, 3.0], [4, 1.0], [6, 2.0]]
    whole(max_steps=4, schedule="constant", warmup=0.0)
    assert best.weights == whole.weights


def test_the_measured_losses_are_those_of_the_adapter_at_that_step(step):
    run = step()
    numbers = run(evaluations=2)
    losses = dict(run.papers["evaluation_losses"])
    assert list(losses) == [7, 14]
    assert numbers["best_step"] == min(losses, key=losses.get)
    assert numbers["eval_loss"] == pytest.approx(losses[numbers["best_step"]], rel=1e-6)


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(step, evaluation_losses, capsys, monkeypatch):
    run = step()
    evaluation_losses(3.0, 1.0, 1.2, 1.1, *[9.9] * 9)
    numbers = run(max_steps=12, evaluations=6, early_stopping=2)
    assert numbers["steps"] == 8
    assert numbers["best_step"] == 4
    assert "step 8: no better for 2 measurements: done" in capsys.readouterr().out
    first = run.weights
    run(max_steps=12, evaluations=6, early_stopping=2)  # as after a crash behind the last step
    assert '"training"' not in capsys.readouterr().out
    assert run.weights == first


def test_an_evaluation_loss_that_stays_far_above_the_best_ends_the_run(step, evaluation_losses):
    run = step()
    evaluation_losses(1.0, 1.6, 1.4, 1.6, 1.7)
    with pytest.raises(Diverged) as ended:
        run(max_steps=12, evaluations=6, worse_times=2, checkpoint_minutes=1e-9)
    said = "step 10 of 12: the evaluation loss is 1.700, 2 times in a row above 1.500; the last good checkpoint is "
    assert f"{said}checkpoint-9; its best/ is the adapter of step 2, the best measured" in str(ended.value)
    newest = checkpoints.newest_valid(run.scratch)
    assert newest.name == "checkpoint-9"
    short = step("short")
    short(max_steps=2, schedule="constant", warmup=0.0)
    assert lora.load(newest / "best").keys() == lora.load(short.adapter).keys()
    assert (newest / "best" / "adapter_config.json").read_bytes() == (
        short.adapter / "adapter_config.json"
    ).read_bytes()


def test_the_best_adapter_is_saved_as_soon_as_it_is_measured(step, evaluation_losses, nf4):
    """With no save due for an hour, since a run that gets worse from there ends without another."""
    run, short = step(), step("short")
    evaluation_losses(2.0, 1.0, math.nan)
    with pytest.raises(Diverged, match=r"the last good checkpoint is checkpoint-4; its best/ is the adapter of step 4"):
        run(max_steps=6, evaluations=3, checkpoint_minutes=60.0, schedule="constant", warmup=0.0)
    short(max_steps=4, schedule="constant", warmup=0.0)
    best = checkpoints.newest_valid(run.scratch) / "best"
    assert (best / "adapter_model.safetensors").read_bytes() == short.weights
    loading.attach(loading.load_nf4(nf4), best)


def test_an_evaluation_loss_that_is_not_a_number_ends_the_run(step, evaluation_losses):
    evaluation_losses(math.nan)
    with pytest.raises(Diverged, match=r"the evaluation loss is nan.*its rows are [0-9a-f]{16}"):
        step()(max_steps=4, evaluations=2)


@pytest.mark.parametrize("times", [4, 5, 6])  # a try asks so often: to the second turn of a measurement, or its end
def test_a_run_that_is_stopped_while_it_measures_ends_with_the_same_best_adapter(step, monkeypatch, times):
    whole, parts = step("whole"), step("parts")
    numbers = whole(evaluations=7)
    cut_off = 0
    for _ in range(30):
        asked = iter(range(10_000))
        monkeypatch.setattr(watch.signals, "requested", lambda asked=asked: next(asked) >= times)
        try:
            again = parts(evaluations=7)
        except TryAgain:
            newest = checkpoints.newest_valid(parts.scratch)
            log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
            done = checkpoints.step_of(newest)
            cut_off += done % 2 == 0 and done not in dict(history.evaluations(log))
        else:
            break
    assert cut_off > 1
    assert parts.weights == whole.weights
    assert parts.papers["evaluation_losses"] == whole.papers["evaluation_losses"]
    assert again["best_step"] == numbers["best_step"]


def test_a_used_up_time_budget_leaves_an_adapter_that_can_be_used_and_a_larger_one_goes_on(step, nf4):
    whole, cut = step("whole"), step("cut")
    whole()
    with pytest.raises(TryAgain, match=r"time budget used up.*Its adapter/ can be used as it is$"):
        cut(max_hours=1e-9)
    saved = checkpoints.newest_valid(cut.scratch) / "adapter"
    model = loading.attach(loading.load_nf4(nf4), saved)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(saved / "adapter_model.safetensors").values())
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()
    cut(max_hours=1.0)
    assert cut.weights == whole.weights


def test_a_try_after_the_time_budget_was_used_up_trains_no_further(step, capsys):
    run = step()
    said = "step 1 of 14, saved as checkpoint-1: time budget used up; to go on raise train.max_hours"
    for _ in range(3):
        with pytest.raises(TryAgain, match=said):
            run(max_hours=1e-9)
    assert capsys.readouterr().out.count("going on from checkpoint-1 of 14 steps") == 2
    assert [folder.name for folder in checkpoints.found(run.scratch)] == ["checkpoint-1"]


def test_the_time_of_earlier_tries_counts(step, monkeypatch):
    """Each step takes a minute, by a clock that is ours; a try is stopped after three."""
    run, minutes, asked = step(), iter(range(10**6)), iter(range(100))
    monkeypatch.setattr(watch.Watch, "measured", lambda _, tokens: {
        "tokens_per_second": tokens / 60, "memory_mib": 1, "time": float(next(minutes))
    })  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(watch.signals, "requested", lambda: next(asked) >= 3)
        with pytest.raises(TryAgain, match="step 3 of 14, saved as checkpoint-3: asked to stop"):
            run(max_hours=1.0)
    with pytest.raises(TryAgain, match="step 3 of 14, saved as checkpoint-3: time budget used up"):
        run(max_hours=2.999 / 60)
    with pytest.raises(TryAgain, match="step 4 of 14, saved as checkpoint-4: time budget used up"):
        run(max_hours=3.0000001 / 60)


def test_a_checkpoint_is_saved_every_so_many_minutes(monkeypatch):
    """Steps of 70 seconds: the first after 5 minutes is the fifth, and so on from the save."""
    seconds = iter(range(0, 10**6, 70))
    watching = watch.Watch(TrainConfig(checkpoint_minutes=5.0), steps=14)
    saved = []
    with monkeypatch.context() as patch:
        patch.setattr(watch.time, "monotonic", lambda: float(next(seconds)))
        watching.on_train_begin(None, TrainerState(), TrainerControl())
        for number in range(1, 14):
            control = TrainerControl()
            watching.on_step_end(None, TrainerState(global_step=number), control)
            saved += [number] if control.should_save else []
    assert saved == [5, 10]


def test_a_used_up_time_budget_names_the_best_adapter_too(step):
    run = step()
    with pytest.raises(TryAgain, match=r"can be used as it is; its best/ is the adapter of step 1, the best measured$"):
        run(max_hours=1e-9, evaluations=14)
    assert (checkpoints.newest_valid(run.scratch) / "best" / "adapter_model.safetensors").is_file()


def test_a_step_that_takes_longer_than_a_stop_may_wait_is_said_once(monkeypatch, capsys):
    seconds = iter(range(0, 10**6, 31))
    watching = watch.Watch(TrainConfig(), steps=14)
    monkeypatch.setattr(watch.time, "monotonic", lambda: float(next(seconds)))
    for number in range(1, 4):
        watching.on_step_begin(None, TrainerState(), TrainerControl())
        watching.on_step_end(None, TrainerState(global_step=number), TrainerControl())
    assert capsys.readouterr().out.count("a step takes 31 s, and a stop waits for its end") == 1


def test_early_stopping_without_measurements_is_refused():
    with pytest.raises(ValueError, match="early_stopping needs evaluations"):
        TrainConfig(early_stopping=2)


def test_measurements_without_evaluation_rows_are_refused(step):
    with pytest.raises(UsageError, match=r"train\.evaluations: dataset/eval\.jsonl has no rows"):
        step(held_out=0)(evaluations=2)


@pytest.mark.parametrize(
    ("schedule", "falls"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_the_schedule_says(step, schedule, falls):
    run = step()
    run(max_steps=9, schedule=schedule, warmup=0.55, learning_rate=1e-3, batch_size=2, gradient_accumulation=1)
    steps: list[dict[str, Any]] = [json.loads(s) for s in (run.adapter / "loss.jsonl").read_text().splitlines()]
    expected = [0.0, 0.2, 0.4, 0.6, 0.8, *falls]  # of the learning rate; 0.55 * 9 steps of rising, rounded up
    assert [entry["learning_rate"] for entry in steps] == pytest.approx([1e-3 * share for share in expected])
