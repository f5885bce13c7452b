"""`micro_batch_size: auto` divides the rows of a step by what a measured step takes, and changes nothing else."""

from __future__ import annotations

import json

import pytest

from components.train_qlora import auto_size, train
from components.train_qlora.auto_size import largest_size
from components.train_qlora.batching import divisors
from components.train_qlora.micro_batches import MicroBatch
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.lm import checkpoints


def test_the_largest_divisor_is_taken_that_fits() -> None:
    sizes = divisors(TrainConfig(global_batch_size=24, num_processes=2))
    assert sizes == [1, 2, 3, 4, 6, 8, 12]
    assert [largest_size(sizes, 100.0, row_bytes) for row_bytes in (1.0, 8.4, 12.0, 14.0, 26.0, 101.0)] == [
        12, 8, 8, 6, 3, 1,
    ]  # fmt: skip


@pytest.fixture
def limited(monkeypatch):
    """Say that the step may have so much more memory than it holds, in multiples of what 8 of its rows take."""

    def limit(steps: float) -> None:
        measure = auto_size._measure

        def measured(*arguments):
            tokens, held_bytes, step_bytes = measure(*arguments)
            total_bytes = (held_bytes + steps * step_bytes) / auto_size.MEMORY_FRACTION
            monkeypatch.setattr(auto_size, "memory_limit_bytes", lambda _: total_bytes)
            return tokens, held_bytes, step_bytes

        monkeypatch.setattr(auto_size, "_measure", measured)

    return limit


def test_the_size_follows_the_memory_and_the_adapter_is_that_of_the_same_size_set_by_hand(step, limited, capsys):
    by_hand = step("by-hand")
    by_hand(micro_batch_size=2, max_steps=3)
    limited(0.3)
    measured = step("measured")
    numbers = measured(micro_batch_size="auto", max_steps=3)
    assert numbers["micro_batch_size"] == 2
    assert measured.weights == by_hand.weights
    assert "train.micro_batch_size: auto; a measured step over the 8 longest rows took" in capsys.readouterr().out
    assert measured.document["settings"]["micro_batch_size"] == "auto"
    # With memory for all rows of a step, all go through the model at once.
    limited(3.0)
    assert step("whole")(micro_batch_size="auto", max_steps=1)["micro_batch_size"] == 8


def test_a_resumed_run_keeps_the_size_of_its_checkpoint(step, limited, monkeypatch):
    limited(0.3)
    run = step()
    correct_step = train._train_step

    def step_and_stop(training_run, *arguments):
        numbers = correct_step(training_run, *arguments)
        if training_run.step == 1:
            raise TryAgain("killed after a checkpoint")
        return numbers

    with monkeypatch.context() as patch:
        patch.setattr(train, "_train_step", step_and_stop)
        with pytest.raises(TryAgain):
            run(micro_batch_size="auto", max_steps=3, checkpoint_minutes=1e-9)

    # What is measured now would be another size.
    limited(3.0)
    assert run(micro_batch_size="auto", max_steps=3)["micro_batch_size"] == 2
    log = json.loads((checkpoints.sorted_checkpoints(run.scratch)[-1] / "state.json").read_text())["log"]
    assert [entry["batch_size"] for entry in log] == [2, 2, 2]


def test_memory_that_runs_out_halves_the_measured_size(step, limited, monkeypatch, capsys):
    limited(3.0)
    correct_loss = train.summed_loss

    def faulty_loss(model, batch):
        if (batch.num_rows if isinstance(batch, MicroBatch) else len(batch["input_ids"])) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return correct_loss(model, batch)

    monkeypatch.setattr(train, "summed_loss", faulty_loss)
    assert step()(micro_batch_size="auto", max_steps=2)["micro_batch_size"] == 4
    assert "out of memory with a micro-batch size of 8" in capsys.readouterr().out
