"""`micro_batch_size: auto` divides the rows of a step by an estimate and a measured step, and changes nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from components.train_qlora import auto_size, train
from components.train_qlora.batching import AUTO_START_ROWS, divisors
from components.train_qlora.micro_batches import MicroBatch
from components.train_qlora.step_estimate import StepEstimate
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.lm import checkpoints, oom
from qlora_retrain.lm.model_shape import ModelShape, UnknownShape

OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def test_the_largest_divisor_is_taken_that_fits() -> None:
    sizes = divisors(TrainConfig(global_batch_size=24, num_processes=2))
    assert sizes == [1, 2, 3, 4, 6, 8, 12]
    assert [auto_size._largest_size(sizes, rows) for rows in (100, 12, 11, 7, 3, 0)] == [12, 12, 8, 6, 3, 1]


class Machine:
    """What the step sees of the machine: the memory that it may have, and what its measured steps take.

    Attributes:
        rows: The memory is enough for so many rows by the estimate.
        factor: What a measured step takes, in multiples of its estimate; the step itself is real.
        measured_rows: The rows of each step that was measured.
    """

    def __init__(self, rows: float, factor: float) -> None:
        self.rows, self.factor, self.measured_rows = rows, factor, list[int]()
        self.estimate: StepEstimate | None = None

    def bytes_of(self, rows: float) -> float:
        """Return the estimate of so many of the longest rows; half a row lies between two of them."""
        assert self.estimate is not None
        below, above = (self.estimate.step_bytes(n, n * self.estimate.longest) for n in (int(rows), int(rows) + 1))
        return below + (rows % 1) * (above - below)


@pytest.fixture
def machine(monkeypatch):
    """Set the memory and the measured bytes of the runs that follow."""

    def make(rows: float, factor: float = 1.0) -> Machine:
        this = Machine(rows, factor)
        from_run, measure = StepEstimate.from_run, real_measure

        def estimate_from_run(run, max_rows):
            this.estimate = from_run(run, max_rows)
            return this.estimate

        def measure_step(model, batch):
            this.measured_rows.append(len(batch["input_ids"]))
            tokens, step_bytes = measure(model, batch)
            assert step_bytes > 0
            return tokens, round(this.factor * this.estimate.step_bytes(this.measured_rows[-1], tokens))

        monkeypatch.setattr(auto_size.StepEstimate, "from_run", estimate_from_run)
        monkeypatch.setattr(auto_size, "_measure", measure_step)
        # What the process uses and what the optimizer needs are not this machine's; without them all of it is free.
        monkeypatch.setattr(auto_size, "MEMORY_FRACTION", 1.0)
        monkeypatch.setattr(auto_size, "_used_bytes", lambda config: 0)
        monkeypatch.setattr(auto_size, "_optimizer_bytes", lambda run: 0)
        monkeypatch.setattr(auto_size, "memory_limit_bytes", lambda config: this.bytes_of(this.rows))
        return this

    real_measure = auto_size._measure
    return make


@pytest.mark.parametrize(
    ("rows", "factor", "measured", "size"),
    [
        (2.5, 1.0, 2, 2),  # as estimated
        (8.5, 1.0, 8, 8),
        (0.5, 1.0, 1, 1),  # not one row fits by the estimate, and training tries all the same
        (5.0, 1.6, 4, 2),  # too little room: down
        (2.5, 0.5, 2, 4),  # the measurement says that more fit: up
        (2.5, 0.01, 2, 4),  # so little is no measurement: memory was used that was free in the process
    ],
)
def test_the_estimate_is_measured_and_corrected(step, machine, rows, factor, measured, size):
    this = machine(rows, factor)
    run = step()
    numbers = run(micro_batch_size="auto", max_steps=1)
    assert this.measured_rows == [measured]
    assert numbers["micro_batch_size"] == size
    assert run.document["settings"]["micro_batch_size"] == "auto"


def test_the_adapter_is_that_of_the_same_size_set_by_hand(step, machine, capsys):
    by_hand = step("by-hand")
    by_hand(micro_batch_size=2, max_steps=3)
    machine(2.5)
    by_estimate = step("by-estimate")
    by_estimate(micro_batch_size="auto", max_steps=3)
    assert by_estimate.weights == by_hand.weights
    assert "auto; 2 rows by the planner's estimate; a measured step over the 2 longest rows" in capsys.readouterr().out


def test_with_the_memory_of_a_real_machine_all_rows_of_a_step_go_through_the_model_at_once(step):
    assert step()(micro_batch_size="auto", max_steps=1)["micro_batch_size"] == 8


def test_a_measured_step_sees_the_memory_that_it_takes(step, monkeypatch):
    correct_loss, measure, measured_mib = auto_size.summed_loss, auto_size._measure, []

    def large_loss(model, batch):
        torch.ones(256 * 2**18)  # 256 MiB for a moment
        return correct_loss(model, batch)

    def measure_step(*arguments):
        tokens, step_bytes = measure(*arguments)
        measured_mib.append(step_bytes / 2**20)
        return tokens, step_bytes

    monkeypatch.setattr(auto_size, "_measure", measure_step)
    run = step()
    with monkeypatch.context() as patch:
        patch.setattr(auto_size, "summed_loss", large_loss)
        run(micro_batch_size="auto", max_steps=1)
    assert 250 < measured_mib[0] < 400  # the kernel counts in batches, and the step itself takes a little


def test_memory_that_runs_out_in_the_measured_step_is_followed_by_smaller_ones(step, machine, monkeypatch, capsys):
    this = machine(100.0, 0.5)  # by the estimate all rows fit, and by the measurement twice as many
    correct_loss = auto_size.summed_loss

    def faulty_loss(model, batch):
        if batch.num_rows > 2:
            raise RuntimeError(OUT_OF_MEMORY)
        return correct_loss(model, batch)

    monkeypatch.setattr(auto_size, "summed_loss", faulty_loss)
    assert step()(micro_batch_size="auto", max_steps=1)["micro_batch_size"] == 2
    assert this.measured_rows == [8, 4, 2]
    printed = capsys.readouterr().out
    assert "out of memory in a measured step over the 4 longest rows" in printed
    assert "8 rows by the planner's estimate; a measured step over the 2 longest rows" in printed


def test_an_error_other_than_memory_is_no_reason_to_measure_again(step, machine, monkeypatch):
    this = machine(100.0)

    def faulty_loss(model, batch):
        raise RuntimeError("a kernel has a fault")

    monkeypatch.setattr(auto_size, "summed_loss", faulty_loss)
    with pytest.raises(RuntimeError, match="a kernel has a fault"):
        step()(micro_batch_size="auto", max_steps=1)
    assert this.measured_rows == [8]
    # One row is the least, so nothing smaller could be measured.
    monkeypatch.setattr(auto_size, "summed_loss", lambda *_: (_ for _ in ()).throw(RuntimeError(OUT_OF_MEMORY)))
    with pytest.raises(MemoryError, match="out of memory with a micro-batch size of 1 ") as raised:
        step("again")(micro_batch_size="auto", max_steps=1)
    assert oom.is_out_of_memory(raised.value)


def test_a_family_that_the_planner_does_not_know_begins_with_a_fixed_number(step, monkeypatch, capsys):
    def unknown(document):
        raise UnknownShape("config.json: another kind of layers")

    monkeypatch.setattr(ModelShape, "from_config", unknown)
    numbers = step()(micro_batch_size="auto", global_batch_size=2 * AUTO_START_ROWS, max_steps=1)
    assert numbers["micro_batch_size"] == 2 * AUTO_START_ROWS
    expected = f"auto; {AUTO_START_ROWS} rows to begin with, since the planner does not know this family"
    assert expected in capsys.readouterr().out


def test_gradients_and_states_that_do_not_exist_yet_are_left_free(step, monkeypatch):
    counted, count = [], auto_size._optimizer_bytes

    def count_bytes(run):
        counted.append((count(run), sum(p.numel() for p in run.optimizer.parameters.values())))
        return counted[-1][0]

    monkeypatch.setattr(auto_size, "_optimizer_bytes", count_bytes)
    step()(micro_batch_size="auto", max_steps=1, optimizer="paged_adamw_32bit")
    # A gradient and two moments, 4 bytes each.
    assert counted == [(12 * counted[0][1], counted[0][1])]


def test_a_resumed_run_keeps_the_size_of_its_checkpoint(step, machine, monkeypatch):
    machine(2.5)
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

    # What would be chosen now is another size.
    this = machine(100.0)
    assert run(micro_batch_size="auto", max_steps=3)["micro_batch_size"] == 2
    assert this.measured_rows == []
    log = json.loads((checkpoints.sorted_checkpoints(run.scratch)[-1] / "state.json").read_text())["log"]
    assert [entry["batch_size"] for entry in log] == [2, 2, 2]


def test_memory_that_runs_out_later_halves_the_chosen_size(step, machine, monkeypatch, capsys):
    machine(100.0)
    correct_loss = train.summed_loss

    def faulty_loss(model, batch):
        if (batch.num_rows if isinstance(batch, MicroBatch) else len(batch["input_ids"])) > 4:
            raise RuntimeError(OUT_OF_MEMORY)
        return correct_loss(model, batch)

    monkeypatch.setattr(train, "summed_loss", faulty_loss)
    assert step()(micro_batch_size="auto", max_steps=2)["micro_batch_size"] == 4
    assert "out of memory with a micro-batch size of 8" in capsys.readouterr().out
