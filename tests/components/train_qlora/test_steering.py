"""Before and between the steps: the preflight check, evaluations, the best adapter, and the ways to end early."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.train_qlora import adapter, evaluation, history, preflight
from components.train_qlora import control as control_module
from components.train_qlora.data import Rows, TokenizedDataset
from components.train_qlora.loss import summed_loss
from components.train_qlora.training_run import ADAPTER_FOLDER, TrainingRun
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import Diverged, TryAgain, UsageError
from qlora_retrain.lm import chat, checkpoints, loading


@pytest.fixture
def set_eval_losses(monkeypatch: pytest.MonkeyPatch):
    """Make the evaluations during training return these losses, one after the other."""

    def arrange(*losses: float) -> None:
        remaining = iter(losses)
        monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(remaining))

    return arrange


@pytest.fixture
def always_preflight(monkeypatch: pytest.MonkeyPatch):
    """Let the preflight check cost any share of a run, so that a short run has it too."""
    monkeypatch.setattr(preflight, "MAX_TOKENS_FRACTION", 1e9)


def test_a_short_run_says_that_preflight_is_skipped(step, capsys):
    step()(max_steps=1)
    assert "preflight skipped: its " in capsys.readouterr().out


def test_preflight_learns_a_few_rows_and_changes_nothing_of_the_run(step, monkeypatch, capsys):
    plain, checked = step("plain"), step("checked")
    # Two steps are too short a run for the check, unless it may cost any share of it.
    plain(max_steps=2)
    monkeypatch.setattr(preflight, "MAX_TOKENS_FRACTION", 1e9)
    checked(max_steps=2)
    assert "preflight: 8 rows, loss " in capsys.readouterr().out
    assert checked.weights == plain.weights


def test_preflight_ends_early_when_the_rows_are_learnt(step, always_preflight, capsys):
    step()(max_steps=1, learning_rate=2e-2, rank=16, alpha=32)
    # "preflight: 8 rows, loss 6.221 to 0.573 in 12 steps"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight: 8 rows"))
    first, last, steps = float(line.split()[4]), float(line.split()[6]), int(line.split()[8])
    assert last < 0.1 * first
    assert steps < 40


def test_preflight_takes_no_more_memory_than_the_run(step, always_preflight, monkeypatch, capsys):
    """Micro-batches are no larger than the run's, and layers are recomputed where the run recomputes them."""
    calls: list[tuple[int, int]] = []  # rows and saved numbers of each forward pass

    def measured_loss(model: Any, batch: Any) -> torch.Tensor:
        num_saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_saved
            num_saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = summed_loss(model, batch)
        calls.append((len(batch["input_ids"]), num_saved))
        return loss

    monkeypatch.setattr(preflight, "summed_loss", measured_loss)
    peaks = {}
    for name, settings in {
        "whole": {"micro_batch_size": 8, "global_batch_size": 8},
        "split": {"micro_batch_size": 2, "global_batch_size": 8},
        "recomputed": {"micro_batch_size": 8, "global_batch_size": 8, "gradient_checkpointing": 1},
    }.items():
        calls.clear()
        step(name)(max_steps=1, **settings)
        peaks[name] = max(rows for rows, _ in calls), max(num_saved for _, num_saved in calls)

    # A quarter of the rows, or recomputed layers: either saves less than half for the backward pass.
    assert (peaks["whole"][0], peaks["split"][0], peaks["recomputed"][0]) == (8, 2, 8)
    assert peaks["split"][1] < peaks["whole"][1] / 2
    assert peaks["recomputed"][1] < peaks["whole"][1] / 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight: 8 rows")]
    assert len(lines) == 3
    assert len(set(lines)) == 1, "the same loss, however it is split"


def test_a_run_that_would_learn_nothing_is_refused_before_it_begins(step, always_preflight):
    run = step()
    with pytest.raises(UsageError, match=r"In 40 steps.*learning_rate \(1e-09\).*mask.*template.*tokenizer"):
        run(learning_rate=1e-9)
    assert not checkpoints.sorted_checkpoints(run.scratch)


def test_preflight_spends_at_most_a_twentieth_of_the_runs_tokens(nf4, chats, capsys, monkeypatch):
    tokenizer = chat.load_tokenizer(nf4)
    encoded = [tokenizer.encode(turns)[0] for turns in chats(44)]
    dataset = TokenizedDataset([{"input_ids": e.input_ids, "labels": e.input_ids} for e in encoded])
    config = TrainConfig(micro_batch_size=4, global_batch_size=8, device="cpu")
    model = adapter.attach_new(loading.load_nf4(nf4, dtype="float32"), config)

    # 40 steps and one more forward pass over the 8 shortest rows; so many steps of the run cost 20 times that.
    cost_tokens = 41 * sum(sorted(dataset.lengths)[:8])
    enough_steps = math.ceil(cost_tokens / 0.05 / (8 * sum(dataset.lengths) / 44))
    preflight.overfit_shortest_rows(model, config, dataset, 0, enough_steps - 1)
    assert f"preflight skipped: its {cost_tokens} tokens are more than 5% of the run's" in capsys.readouterr().out

    masks = []
    monkeypatch.setattr(preflight, "LEARNT_FRACTION", 0.0)  # so that it takes all 40 steps
    monkeypatch.setattr(
        preflight,
        "summed_loss",
        lambda model, batch: masks.append(batch["attention_mask"]) or summed_loss(model, batch),
    )
    preflight.overfit_shortest_rows(model, config, dataset, 0, enough_steps)
    assert "in 40 steps" in capsys.readouterr().out
    assert sum(int(mask.sum()) for mask in masks) == cost_tokens


@pytest.mark.parametrize(("lowest", "is_learnt"), [(0.99, False), (0.97, True)])
def test_preflight_passes_on_a_fall_larger_than_rounding(step, always_preflight, monkeypatch, lowest, is_learnt):
    """With a small learning rate 40 steps do not learn the rows by heart, and need not."""
    monkeypatch.setattr(preflight, "_train_on_batch", lambda *_: [1.0, *[lowest] * 40])
    if is_learnt:
        step()(max_steps=1)
    else:
        with pytest.raises(UsageError, match=r"went from 1\.000 to no less than 0\.990"):
            step()(max_steps=1)


def test_the_adapter_of_the_lowest_evaluation_loss_is_kept(step, set_eval_losses):
    best, short = step("best"), step("short")
    set_eval_losses(3.0, 1.0, 2.0)
    numbers = best(max_steps=6, num_evals=3, schedule="constant", warmup_ratio=0.0)
    assert numbers["best_step"] == 4
    assert best.document["evaluation_losses"] == [[2, 3.0], [4, 1.0], [6, 2.0]]

    # With a constant learning rate the first 4 steps do not depend on how many follow.
    short(max_steps=4, schedule="constant", warmup_ratio=0.0)
    assert best.weights == short.weights


def test_the_evaluation_losses_are_those_of_the_adapter_at_that_step(step):
    run = step()
    numbers = run(num_evals=2)
    # The adapter that is written is the best one, and its loss is measured once more.
    losses = dict(run.document["evaluation_losses"])
    assert list(losses) == [7, 14]
    assert numbers["best_step"] == min(losses, key=losses.get)
    assert numbers["eval_loss"] == pytest.approx(losses[numbers["best_step"]], rel=1e-6)


def test_a_run_that_stops_improving_ends_early_and_stays_ended(step, set_eval_losses, capsys, monkeypatch):
    run = step()
    # The third and the fourth are no better than the second; the last ones must never be asked for.
    set_eval_losses(3.0, 1.0, 1.2, 1.1, *[9.9] * 9)
    numbers = run(max_steps=12, num_evals=6, early_stopping_patience=2)
    assert numbers["steps"] == 8
    assert numbers["best_step"] == 4
    assert "step 8: the loss has not improved for 2 evaluations, so training ends" in capsys.readouterr().out

    # As after a crash behind the last step: the next attempt has nothing to train.
    weights = run.weights
    run(max_steps=12, num_evals=6, early_stopping_patience=2)
    assert '"training"' not in capsys.readouterr().out
    assert run.weights == weights


def test_an_evaluation_loss_that_stays_far_above_the_best_ends_the_run(step, set_eval_losses):
    run = step()
    # 1.4 is below 1.5 times the best and ends the first series of bad ones.
    set_eval_losses(1.0, 1.6, 1.4, 1.6, 1.7)
    with pytest.raises(Diverged) as caught:
        run(max_steps=12, num_evals=6, divergence_patience=2, checkpoint_minutes=1e-9)

    message = "step 10 of 12: the evaluation loss is 1.700, 2 times in a row above 1.500; the last good checkpoint is "
    assert f"{message}checkpoint-9; its best/ is the adapter of step 2, with the lowest evaluation loss" in str(
        caught.value
    )

    # The best adapter in the checkpoint has the files of any other.
    newest = checkpoints.newest_valid(run.scratch)
    assert newest.name == "checkpoint-9"
    short = step("short")
    short(max_steps=2, schedule="constant", warmup_ratio=0.0)
    assert adapter.load_weights(newest / "best").keys() == adapter.load_weights(short.adapter).keys()
    assert (newest / "best" / adapter.CONFIG_FILE).read_bytes() == (
        newest / ADAPTER_FOLDER / adapter.CONFIG_FILE
    ).read_bytes()


def test_the_best_adapter_is_saved_as_soon_as_it_is_evaluated(step, set_eval_losses, nf4):
    """No other save is due for an hour, and a run that diverges from there ends without one."""
    run, short = step(), step("short")
    set_eval_losses(2.0, 1.0, math.nan)
    with pytest.raises(Diverged, match=r"the last good checkpoint is checkpoint-4; its best/ is the adapter of step 4"):
        run(max_steps=6, num_evals=3, checkpoint_minutes=60.0, schedule="constant", warmup_ratio=0.0)

    short(max_steps=4, schedule="constant", warmup_ratio=0.0)
    best = checkpoints.newest_valid(run.scratch) / "best"
    # What ships has the scale 8 / 4 in B.
    shipped = adapter.load_weights(short.adapter)
    for name, weight in adapter.load_weights(best).items():
        assert torch.equal(shipped[name], 2 * weight if "lora_B" in name else weight), name
    loading.attach_adapter(loading.load_nf4(nf4), best)


def test_an_evaluation_loss_that_is_not_a_number_ends_the_run(step, set_eval_losses):
    set_eval_losses(math.nan)
    with pytest.raises(Diverged, match=r"the evaluation loss is nan.*its rows are train-\d+, "):
        step()(max_steps=4, num_evals=2)


# How often an attempt asks whether to stop, before it is told to: up to the second batch of an evaluation, or its end.
@pytest.mark.parametrize("num_checks", [4, 5, 6])
def test_a_run_that_is_stopped_while_it_evaluates_ends_with_the_same_best_adapter(step, monkeypatch, num_checks):
    whole, parts = step("whole"), step("parts")
    expected = whole(num_evals=7)

    interrupted_evals = 0
    for _ in range(30):
        checks = iter(range(10_000))
        monkeypatch.setattr(control_module.signals, "stop_requested", lambda checks=checks: next(checks) >= num_checks)
        try:
            numbers = parts(num_evals=7)
        except TryAgain:
            newest = checkpoints.newest_valid(parts.scratch)
            log = json.loads((newest / "state.json").read_text())["log"]
            reached = checkpoints.step_of(newest)
            # Every second step is evaluated.
            interrupted_evals += reached % 2 == 0 and reached not in dict(history.eval_losses(log))
        else:
            break

    assert interrupted_evals > 1
    assert parts.weights == whole.weights
    assert parts.document["evaluation_losses"] == whole.document["evaluation_losses"]
    assert numbers["best_step"] == expected["best_step"]


def test_a_used_up_time_budget_leaves_a_usable_adapter_and_a_larger_budget_resumes(step, nf4):
    whole, parts = step("whole"), step("parts")
    whole()
    with pytest.raises(UsageError, match=r"time budget used up.*Its adapter/ is a complete adapter$"):
        parts(max_hours=1e-9)

    saved = checkpoints.newest_valid(parts.scratch) / "adapter"
    # It loads as any adapter does, and computes.
    model = loading.attach_adapter(loading.load_nf4(nf4), saved)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(saved / "adapter_model.safetensors").values())
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 5, 9]])).logits).all()

    parts(max_hours=1.0)
    assert parts.weights == whole.weights


def test_an_attempt_after_the_time_budget_was_used_up_trains_no_further(step, capsys):
    run = step()
    message = "step 1 of 14, saved as checkpoint-1: time budget used up; raise train.max_hours to continue"
    # The second and the third attempt resume, and end at once.
    for _ in range(3):
        with pytest.raises(UsageError, match=message):
            run(max_hours=1e-9)
    assert capsys.readouterr().out.count("resuming from checkpoint-1 of 14 steps") == 2
    assert [folder.name for folder in checkpoints.sorted_checkpoints(run.scratch)] == ["checkpoint-1"]


def test_the_time_of_earlier_attempts_counts(step, monkeypatch):
    """Each step takes a minute by a fake clock, and the first attempt is stopped after three steps."""
    run, minutes, checks = step(), iter(range(10**6)), iter(range(100))
    monkeypatch.setattr(control_module.TrainingControl, "step_metrics", lambda _, tokens: {
        "tokens_per_second": tokens / 60, "memory_mib": 1, "time": float(next(minutes)), "batch_size": 16
    })  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(control_module.signals, "stop_requested", lambda: next(checks) >= 3)
        with pytest.raises(TryAgain, match="step 3 of 14, saved as checkpoint-3: asked to stop"):
            run(max_hours=1.0)

    # Three minutes are used up for a budget just below them, and not for one just above.
    with pytest.raises(UsageError, match="step 3 of 14, saved as checkpoint-3: time budget used up"):
        run(max_hours=2.999 / 60)
    with pytest.raises(UsageError, match="step 4 of 14, saved as checkpoint-4: time budget used up"):
        run(max_hours=3.0000001 / 60)


def blank_run(**settings: Any) -> TrainingRun:
    """Return a run of 14 steps over nothing, for what only looks at its settings and counts."""
    rows = Rows(TokenizedDataset([]), TokenizedDataset([]), pad_token_id=0)
    return TrainingRun(TrainConfig(max_steps=14, **settings), None, None, rows, None, Path(), print)


def test_a_checkpoint_is_saved_every_so_many_minutes(monkeypatch):
    """With steps of 70 seconds the fifth is the first after 5 minutes, and so on from each save."""
    seconds = iter(range(0, 10**6, 70))
    run, saved_steps = blank_run(checkpoint_minutes=5.0), []
    with monkeypatch.context() as patch:
        patch.setattr(control_module.time, "monotonic", lambda: float(next(seconds)))
        # The clock is read once at the start, and once for each step.
        control = control_module.TrainingControl(run)
        for run.step in range(1, 14):
            saved_steps += [run.step] if control.end_step().save else []
    assert saved_steps == [5, 10]


def test_a_used_up_time_budget_names_the_best_adapter_too(step):
    run = step()
    with pytest.raises(UsageError, match=r"its best/ is the adapter of step 1, with the lowest evaluation loss$"):
        run(max_hours=1e-9, num_evals=14)
    assert (checkpoints.newest_valid(run.scratch) / "best" / "adapter_model.safetensors").is_file()


def test_a_slow_step_is_warned_of_once(monkeypatch, capsys):
    # Each look at the clock is 31 s after the last, one more than a step may take without a warning.
    seconds = iter(range(0, 10**6, 31))
    run = blank_run()
    control = control_module.TrainingControl(run)
    monkeypatch.setattr(control_module.time, "monotonic", lambda: float(next(seconds)))
    for run.step in range(1, 4):
        control.begin_step()
        control.end_step()
    assert capsys.readouterr().out.count("one step takes 31 s, and a stop request waits for the end of the step") == 1


def test_early_stopping_without_evaluations_is_refused():
    with pytest.raises(ValueError, match="early_stopping_patience has no effect without evaluations"):
        TrainConfig(early_stopping_patience=2)


def test_a_warm_up_is_set_once_and_ends_before_the_run_does(step):
    with pytest.raises(ValueError, match=r"warmup_ratio: 0\.03 and warmup_steps: 100 say the same thing twice"):
        TrainConfig(warmup_ratio=0.03, warmup_steps=100)
    with pytest.raises(UsageError, match=r"train\.warmup_steps: .* rise for 14 steps, and the run has 14 in all"):
        step()(warmup_steps=14)


def test_evaluations_without_evaluation_rows_are_refused(step):
    with pytest.raises(UsageError, match=r"train\.num_evals: dataset/eval\.jsonl has no rows"):
        step(held_out=0)(num_evals=2)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_the_schedule_says(step, schedule, decay):
    run = step()
    run(max_steps=9, schedule=schedule, warmup_ratio=0.55, learning_rate=1e-3, micro_batch_size=2, global_batch_size=2)
    steps: list[dict[str, Any]] = [json.loads(s) for s in (run.adapter / "loss.jsonl").read_text().splitlines()]

    # The learning rate rises over 0.55 * 9 steps, rounded up to 5.
    fractions = [0.0, 0.2, 0.4, 0.6, 0.8, *decay]
    assert [entry["learning_rate"] for entry in steps] == pytest.approx([1e-3 * fraction for fraction in fractions])
