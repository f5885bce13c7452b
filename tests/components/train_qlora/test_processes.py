"""Several processes that share an optimizer step: real ones, over gloo, on the tiny model."""

import json
import signal
import time
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from components.train_qlora.rows import IGNORED, Collate, Order, Rows, Steps
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import checkpoints

SETTINGS = {
    "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "batch_size": 2, "gradient_accumulation": 4,
    "max_steps": 9, "device": "cpu", "attention": "eager", "precision": "float32", "processes": 2,
}  # fmt: skip


@pytest.fixture
def program(program):
    """Start the step as a program of its own, in two processes."""
    return lambda step, fault=":", **settings: program(step, fault, **SETTINGS | settings)


def log(step) -> list[dict[str, float]]:
    return [json.loads(line) for line in (step.adapter / "loss.jsonl").read_text().splitlines()]


def same(one, other, *, rel: float) -> None:
    """The same work, and the same losses and adapter but for the order in which floats were added."""
    for a, b in zip(log(one), log(other), strict=True):
        for name in ("step", "tokens", "supervised_tokens", "learning_rate"):
            assert a[name] == b[name], name
        assert b["loss"] == pytest.approx(a["loss"], rel=rel)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * rel)
    weights = [load_file(step.adapter / "adapter_model.safetensors") for step in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=10 * rel * float(tensor.abs().max())), name


@pytest.mark.slow
def test_two_processes_train_to_the_losses_and_the_adapter_of_one(step, capsys):
    """41 rows are 5 steps of 8 and one of a single row, from which the second process learns nothing."""
    one, two = step("one", train=41, held_out=9), step("two", train=41, held_out=9)
    settings = SETTINGS | {"dropout": 0.0, "evaluations": 3}
    alone = one(**settings | {"processes": 1})
    shared = two(**settings)
    same(one, two, rel=1e-5)
    assert [entry["tokens"] for entry in log(one)][5] < 60  # the step of a single row
    assert one.papers["evaluation_losses"] == [
        [step, pytest.approx(loss, rel=1e-5)] for step, loss in two.papers["evaluation_losses"]
    ]
    assert shared["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert (shared["processes"], shared["rows_a_pass"]) == (2, 2)
    assert shared["peak_rss_mib"] > 1.5 * 300  # of both
    said = capsys.readouterr().out
    assert "2 processes share 8 rows a step (ddp)" in said
    assert said.count("optimizer: ") == 2  # once a run: one process talks


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_base_in_parts_trains_as_a_whole_one(step, precision, capsys):
    """float32 unpacks the 4-bit weights; bfloat16 shards them as they are."""
    one, two = step("one"), step("two")
    settings = SETTINGS | {"dropout": 0.0, "max_steps": 4, "precision": precision}
    one(**settings)
    two(**settings | {"parallel": "fsdp"})
    same(one, two, rel=1e-7)  # DDP over two whole bases: the same arithmetic in the same order
    words = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fsdp: ")).split()
    assert words[1] == "2"
    assert int(words[4]) == 2 * int(words[-1])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_and_killed_two_processes_end_with_the_bytes_of_an_uninterrupted_run(step, program, parallel):
    whole, parts = step("whole"), step("parts")
    settings = {**SETTINGS, "parallel": parallel}
    whole(**settings)
    # A signal to the whole step, as a pod's end sends it.
    running = program(parts, checkpoint_minutes=1e-9, parallel=parallel)
    until = time.monotonic() + 200
    while not (parts.scratch / "checkpoint-2" / checkpoints.MARKER).exists() and time.monotonic() < until:
        time.sleep(0.002)
    running.process.send_signal(signal.SIGTERM)
    code, said, errors = running.ended()
    assert (code, "saved as checkpoint-" in errors, "asked to stop" in errors) == (75, True, True), errors
    assert "Traceback" not in errors
    reached = checkpoints.step_of(checkpoints.newest_valid(parts.scratch))
    assert 2 <= reached < 9
    # One of the processes asked alone: all of them stop.
    code, said, errors = program(parts, "SIGTERM:0", parallel=parallel).ended()
    assert code == 75, errors
    assert f"step {reached + 1} of 9, saved as checkpoint-{reached + 1}: asked to stop" in errors
    assert f"going on from checkpoint-{reached} of 9 steps" in said
    # One of them killed, as the kernel does where memory is short.
    code, said, errors = program(parts, "SIGKILL:1", checkpoint_minutes=1e-9, parallel=parallel).ended()
    assert code == 75
    assert "process 1 of 2 was ended by SIGKILL, as when memory runs out; the others were stopped" in errors
    assert "Traceback" not in errors
    assert parts(**settings)["steps"] == 9
    assert parts.weights == whole.weights
    assert log(parts) == log(whole)


@pytest.mark.slow
def test_the_death_of_the_step_is_the_death_of_its_processes(step, program):
    run = step()
    running = program(run, max_steps=100_000)
    for line in running.process.stdout:
        if '"training"' in line:
            break
    assert len([name for name in running.session() if "python" in name]) >= 3
    running.process.kill()
    running.process.wait()
    assert not running.left()


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_in_one_process_names_the_rows_of_all(step, program):
    code, _, errors = program(step(), "nan:4", checkpoint_minutes=1e-9).ended()
    assert code == 14, errors
    what, rows = errors.splitlines()[-1].split("; its rows are ")
    assert what == "step 3 of 9: the loss is nan; the last good checkpoint is checkpoint-2"
    assert len(set(rows.partition(".")[0].split(", "))) == 8


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_halves_the_rows_of_all(step, program):
    run = step()
    code, said, errors = program(run, "memory:3", max_steps=3, checkpoint_minutes=1e-9).ended()
    assert code == 0, errors
    assert "out of memory with 2 rows a pass, the longest row having" in said
    assert "going on with 1 x 8" in said
    assert "going on from checkpoint-1 of 3 steps" in said
    numbers = json.loads(said.splitlines()[-1])
    assert (numbers["steps"], numbers["rows_a_pass"], numbers["out_of_memory"]) == (3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_that_would_learn_nothing_is_refused_by_all_processes_before_it_begins(step, program, parallel):
    run = step()
    code, _, errors = program(run, max_steps=1000, learning_rate=1e-9, parallel=parallel).ended()
    assert code == 12, errors
    assert "preflight: 8 rows were shown 40 times" in errors
    assert not checkpoints.found(run.scratch)


@pytest.mark.slow
def test_a_full_disk_ends_the_try_of_all_processes_and_harms_nothing(step, program, small_disk):
    run = step()
    with small_disk(run.scratch, "700k"):
        code, _, errors = program(run, checkpoint_minutes=1e-9, rank=16, max_steps=3).ended()
        assert code == 75, errors
        assert "no space for a checkpoint in scratch; free some and run it again" in errors
        assert all(checkpoints.verify(folder) is None for folder in checkpoints.found(run.scratch))


@pytest.mark.slow
def test_a_fault_of_ours_in_one_process_is_told_with_its_traceback(step, program):
    code, _, errors = program(step(), "bug:1").ended()
    assert code == 1
    assert "RuntimeError: process 1: ValueError: a fault of ours" in errors
    assert "in spoilt" in errors


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows_a_step", [8, 6, 7, 2])
def test_the_processes_share_every_step_and_repeat_no_row(processes, rows_a_step):
    lengths = [10 + 7 * i % 31 for i in range(101)]  # whole steps, and one that is not
    order = Order(lengths, rows_a_step, seed=3)
    whole = list(order)
    steps = [whole[i : i + rows_a_step] for i in range(0, len(whole), rows_a_step)]
    each = [list(Steps(order, process, processes)) for process in range(processes)]
    assert {len(found) for found in each} == {len(Steps(order, 0, processes))} == {len(steps)}
    for number, step in enumerate(steps):
        shares = [[row for row in found[number] if row >= 0] for found in each]
        assert all(found[number] for found in each)
        assert sorted(chain(*shares)) == sorted(step)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_processes_get_equally_many_tokens():
    lengths = [10 + 7 * i % 97 for i in range(960)]
    order = Order(lengths, rows_per_step=32, seed=0)
    tokens = [[sum(lengths[row] for row in rows) for rows in Steps(order, process, 4)] for process in range(4)]
    assert max(max(now) / min(now) for now in zip(*tokens, strict=True)) < 1.03


def test_a_pass_without_a_row_of_its_own_has_nothing_to_learn():
    rows = Rows([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}] * 2)
    batch = Collate(0)([rows[~0]])
    assert batch["input_ids"].tolist() == [[5]]
    assert batch["rows"].tolist() == [-1]
    assert (batch["labels"] == IGNORED).all()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"processes": 3, "batch_size": 1, "gradient_accumulation": 2}, "3 cannot share a step of 2 examples"),
        ({"parallel": "fsdp"}, "fsdp shares the base among processes, and processes is 1"),
    ],
)
def test_processes_with_nothing_to_share_are_refused(settings, what):
    with pytest.raises(ValueError, match=what):
        TrainConfig(**settings)


def test_the_number_of_processes_is_part_of_the_recipe():
    assert TrainConfig().identity() != TrainConfig(processes=2).identity()
    assert TrainConfig(processes=2).identity() != TrainConfig(processes=2, parallel="fsdp").identity()


def gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.gpu
@pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_to_the_losses_of_one(step, parallel):
    one, two = step("one"), step("two")
    settings = SETTINGS | {"dropout": 0.0, "device": "cuda", "attention": "sdpa", "precision": "bfloat16"}
    alone = one(**settings | {"processes": 1})
    shared = two(**settings | {"parallel": parallel})
    assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=0.01)
    assert shared["tokens"] == alone["tokens"]
