"""Several processes that share an optimizer step: real ones, over gloo, on the tiny model."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from components.quantize_model.step import run as quantize
from components.train_qlora.data import (
    IGNORE_INDEX,
    DistributedBatchSampler,
    LengthGroupedSampler,
    PaddingCollator,
    TokenizedDataset,
)
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.lm import checkpoints

SETTINGS = {
    "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "micro_batch_size": 2, "global_batch_size": 8,
    "max_steps": 9, "device": "cpu", "attention": "eager", "precision": "float32", "num_processes": 2,
}  # fmt: skip


@pytest.fixture
def program(program):
    """Start the step as a program of its own, in two processes."""
    return lambda step, fault=":", **settings: program(step, fault, **SETTINGS | settings)


@pytest.fixture
def train(program):
    """Run the step to its end, and return its numbers and what it printed."""

    def run(step, **settings):
        exit_code, stdout, stderr = program(step, **settings).finish()
        assert exit_code == 0, stderr
        return json.loads(stdout.splitlines()[-1]), stdout

    return run


def log(step) -> list[dict[str, float]]:
    return [json.loads(line) for line in (step.adapter / "loss.jsonl").read_text().splitlines()]


def assert_same_training(expected, actual, *, rel: float) -> None:
    """Assert the same work, and the same losses and adapter except for the order in which floats were added."""
    for a, b in zip(log(expected), log(actual), strict=True):
        for name in ("step", "tokens", "supervised_tokens", "learning_rate"):
            assert a[name] == b[name], name
        assert b["loss"] == pytest.approx(a["loss"], rel=rel)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * rel)

    # An element may differ by that much of the tensor's largest one.
    weights = [load_file(step.adapter / "adapter_model.safetensors") for step in (expected, actual)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=10 * rel * float(tensor.abs().max())), name


@pytest.mark.slow
def test_two_processes_train_to_the_losses_and_the_adapter_of_one(step, capsys):
    """41 rows are 5 steps of 8 and one of a single row, in which the second process has nothing to learn."""
    single, double = step("single", train=41, held_out=9), step("double", train=41, held_out=9)
    settings = SETTINGS | {"dropout": 0.0, "num_evals": 3}
    expected = single(**settings | {"num_processes": 1})
    numbers = double(**settings)
    assert_same_training(single, double, rel=1e-5)
    assert [entry["tokens"] for entry in log(single)][5] < 60  # the step of a single row

    assert single.document["evaluation_losses"] == [
        [step, pytest.approx(loss, rel=1e-5)] for step, loss in double.document["evaluation_losses"]
    ]
    assert numbers["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert (numbers["num_processes"], numbers["micro_batch_size"]) == (2, 2)
    assert numbers["peak_rss_mib"] > 1.5 * 300  # of both processes

    # Only rank 0 prints, so each line is there once per run.
    output = capsys.readouterr().out
    assert "2 processes share 8 rows per step (ddp)" in output
    assert output.count("optimizer: ") == 2


# Models that scale or cap their logits: what they make of their output layer's outputs is computed in chunks.
CHANGED_LOGITS = {"Granite": {"logits_scaling": 8.0}, "Gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0}}


def quantized_model(family: str, tiny_model: Path, folder: Path) -> Path:
    """Quantize a random model of another family with the tiny model's tokenizer."""
    base, nf4 = folder / "base", folder / "nf4"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **CHANGED_LOGITS[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # large logits, which a cap changes
    model.to(torch.bfloat16).save_pretrained(base)
    nf4.mkdir()
    quantize(QuantizeConfig(), base, nf4)
    return nf4


# The first test compares LoRA. In CI one method is enough, the one that does most in a step.
@pytest.mark.parametrize(
    "method",
    [
        "adalora",
        *(
            pytest.param(m, marks=pytest.mark.soak)
            for m in ("dora", "dylora", "lora+", "rslora", "qa-lora", "lora-xs", "loftq", "lq-lora", "ir-qlora")
        ),
    ],
)
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_two_processes_train_by_every_method_as_one_does(step, base_of, train, method, parallel):
    single, shared = step("single"), step("shared")
    single.base_nf4 = shared.base_nf4 = base_of(method)
    settings = {"method": method, "alpha": None, "dropout": 0.0, "max_steps": 6}
    single(**SETTINGS | settings | {"num_processes": 1})
    train(shared, **settings, parallel=parallel)
    assert_same_training(single, shared, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("Granite", "fsdp"),
        pytest.param("Granite", "ddp", marks=pytest.mark.slow),
        pytest.param("Gemma2", "ddp", marks=pytest.mark.slow),
        pytest.param("Gemma2", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_a_model_that_changes_its_logits_as_one_does_with_a_size_of_their_own_choice(
    step, train, tiny_model, tmp_path, family, parallel
):
    nf4 = quantized_model(family, tiny_model, tmp_path)
    single, double = step("single"), step("double")
    single.base_nf4 = double.base_nf4 = nf4
    settings = {"dropout": 0.0, "max_steps": 2}
    single(**SETTINGS | settings | {"num_processes": 1})
    numbers, stdout = train(double, **settings, micro_batch_size="auto", parallel=parallel)
    assert_same_training(single, double, rel=1e-5)
    # Each process has four of the eight rows of a step, and the machine has memory for all of them.
    assert numbers["micro_batch_size"] == 4
    assert "train.micro_batch_size: auto; 4 rows by the planner's estimate; a measured step" in stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "method"),
    [("float32", "lora"), ("bfloat16", "lora"), pytest.param("bfloat16", "qa-lora", marks=pytest.mark.soak)],
)
def test_a_sharded_base_trains_as_a_whole_one(step, base_of, train, precision, method):
    """float32 unpacks the 4-bit weights; bfloat16 shards them as they are. QA-LoRA's base has layers of our own."""
    ddp, fsdp = step("ddp"), step("fsdp")
    ddp.base_nf4 = fsdp.base_nf4 = base_of(method)
    settings = {"dropout": 0.0, "max_steps": 4, "precision": precision, "method": method}
    train(ddp, **settings)
    _, stdout = train(fsdp, **settings, parallel="fsdp")
    assert_same_training(ddp, fsdp, rel=1e-7)  # DDP over two whole bases: the same arithmetic in the same order

    words = next(line for line in stdout.splitlines() if line.startswith("fsdp: ")).split()
    assert words[1] == "2"
    assert int(words[4]) == 2 * int(words[-3])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_and_killed_two_processes_end_with_the_bytes_of_an_uninterrupted_run(step, program, train, parallel):
    whole, parts = step("whole"), step("parts")
    train(whole, parallel=parallel)

    # A signal to the step alone, as the end of a pod sends it.
    exit_code, stdout, stderr = program(parts, "stop:4", checkpoint_minutes=1e-9, parallel=parallel).finish()
    assert (exit_code, "saved as checkpoint-" in stderr, "asked to stop" in stderr) == (75, True, True), stderr
    assert "Traceback" not in stderr
    reached = checkpoints.step_of(checkpoints.newest_valid(parts.scratch))
    assert 2 <= reached < 9

    # A signal to one of the processes: all of them stop after the same step.
    exit_code, stdout, stderr = program(parts, "SIGTERM:0", parallel=parallel).finish()
    assert exit_code == 75, stderr
    assert f"step {reached + 1} of 9, saved as checkpoint-{reached + 1}: asked to stop" in stderr
    assert f"resuming from checkpoint-{reached} of 9 steps" in stdout

    # One of them is killed, as the kernel does where memory is short.
    exit_code, stdout, stderr = program(parts, "SIGKILL:1", checkpoint_minutes=1e-9, parallel=parallel).finish()
    assert exit_code == 75
    assert "process 1 of 2 was ended by SIGKILL, as happens when memory runs out; the others were stopped" in stderr
    assert "Traceback" not in stderr

    numbers, _ = train(parts, parallel=parallel)
    assert numbers["steps"] == 9
    assert parts.weights == whole.weights
    assert log(parts) == log(whole)


@pytest.mark.slow
def test_the_training_processes_die_with_the_step(step, program):
    run = step()
    # It trains once it reports progress.
    running = program(run, fresh=True, max_steps=100_000)
    for line in running.process.stdout:
        if '"training"' in line:
            break
    assert len([name for name in running.session_processes().values() if "python" in name]) >= 3

    # SIGKILL leaves the step no chance to end them: the kernel does.
    running.process.kill()
    running.process.wait()
    assert not running.leftover_processes()


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_in_one_process_names_the_rows_of_all(step, program):
    exit_code, _, stderr = program(step(), "nan:4", checkpoint_minutes=1e-9).finish()
    assert exit_code == 14, stderr
    # Rank 1 alone saw the NaN, in the third step; all 8 rows of that step are named.
    reason, rows = stderr.splitlines()[-1].split("; its rows are ")
    assert reason == "step 3 of 9: the loss is nan; the last good checkpoint is checkpoint-2"
    assert len(set(rows.partition(".")[0].split(", "))) == 8


@pytest.mark.slow
def test_out_of_memory_in_one_process_halves_the_micro_batches_of_all(step, program):
    run = step()
    exit_code, stdout, stderr = program(run, "memory:3", max_steps=3, checkpoint_minutes=1e-9).finish()
    assert exit_code == 0, stderr
    assert "out of memory with a micro-batch size of 2 (the longest row has" in stdout
    assert "continuing with a micro-batch size of 1, 8 per step" in stdout
    assert "resuming from checkpoint-1 of 3 steps" in stdout
    # The numbers are the program's last line.
    numbers = json.loads(stdout.splitlines()[-1])
    assert (numbers["steps"], numbers["micro_batch_size"], numbers["out_of_memory"]) == (3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("ddp", "out of memory in a measured step over the 4 longest rows"),
        ("fsdp", "continuing with a micro-batch size of 2, 4 per step"),  # a process cannot leave a step alone
    ],
)
def test_out_of_memory_in_the_measured_step_of_one_process_makes_all_measure_a_smaller_one(
    step, program, parallel, message
):
    run = step()
    settings = {"micro_batch_size": "auto", "max_steps": 2, "parallel": parallel}
    exit_code, stdout, stderr = program(run, "measure:2", **settings).finish()
    assert exit_code == 0, stderr
    assert message in stdout
    assert json.loads(stdout.splitlines()[-1])["micro_batch_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_refuse_a_run_that_would_learn_nothing_before_it_begins(step, program, parallel):
    run = step()
    exit_code, _, stderr = program(run, max_steps=1000, learning_rate=1e-9, parallel=parallel).finish()
    assert exit_code == 12, stderr
    assert "preflight: the model does not learn. In 40 steps" in stderr
    assert not checkpoints.sorted_checkpoints(run.scratch)


@pytest.mark.slow
def test_a_full_disk_ends_the_attempt_of_all_processes_and_damages_nothing(step, program, small_disk):
    run = step()
    # 700 KiB hold one checkpoint of rank 16 and not two.
    with small_disk(run.scratch, "700k"):
        exit_code, _, stderr = program(run, checkpoint_minutes=1e-9, rank=16, max_steps=3).finish()
        assert exit_code == 75, stderr
        assert "no space for a checkpoint in scratch; free some space" in stderr
        assert all(checkpoints.invalid_reason(folder) is None for folder in checkpoints.sorted_checkpoints(run.scratch))


@pytest.mark.slow
def test_a_bug_in_one_process_is_reported_with_its_traceback(step, program):
    exit_code, _, stderr = program(step(), "bug:1").finish()
    assert exit_code == 1
    assert "RuntimeError: process 1: ValueError: a fault of ours" in stderr
    assert "in faulty_loss" in stderr


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("global_batch_size", [8, 6, 7, 2])
def test_the_processes_share_every_step_and_repeat_no_row(world_size, global_batch_size):
    lengths = [10 + 7 * i % 31 for i in range(101)]  # whole steps, and one that is not
    sampler = LengthGroupedSampler(lengths, global_batch_size, seed=3)
    order = list(sampler)
    steps = [order[i : i + global_batch_size] for i in range(0, len(order), global_batch_size)]

    batches = [list(DistributedBatchSampler(sampler, rank, world_size)) for rank in range(world_size)]
    num_steps = len(DistributedBatchSampler(sampler, 0, world_size))
    assert {len(own_batches) for own_batches in batches} == {num_steps} == {len(steps)}
    for number, step in enumerate(steps):
        # Where a step has fewer rows than there are processes, some get a filler row, whose index is below 0.
        shares = [[row for row in own_batches[number] if row >= 0] for own_batches in batches]
        assert all(own_batches[number] for own_batches in batches)
        assert sorted(chain(*shares)) == sorted(step)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_processes_get_equally_many_tokens():
    lengths = [10 + 7 * i % 97 for i in range(960)]
    sampler = LengthGroupedSampler(lengths, global_batch_size=32, seed=0)
    tokens = [
        [sum(lengths[row] for row in rows) for rows in DistributedBatchSampler(sampler, rank, 4)] for rank in range(4)
    ]
    # A step lasts as long as its slowest process: 3 % is the most that the others wait.
    assert max(max(step_tokens) / min(step_tokens) for step_tokens in zip(*tokens, strict=True)) < 1.03


def test_a_filler_row_has_nothing_to_learn():
    dataset = TokenizedDataset([{"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]}] * 2)
    batch = PaddingCollator(0)([dataset[~0]])
    assert batch["input_ids"].tolist() == [[5]]
    assert batch["row_indices"].tolist() == [-1]
    assert (batch["labels"] == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 3, "micro_batch_size": 1, "global_batch_size": 2}, "3 cannot share a step of 2 rows"),
        ({"parallel": "fsdp"}, "fsdp shares the base among processes, and num_processes is 1"),
    ],
)
def test_processes_with_nothing_to_share_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_the_number_of_processes_is_part_of_the_recipe():
    assert TrainConfig().identity() != TrainConfig(num_processes=2).identity()
    assert TrainConfig(num_processes=2).identity() != TrainConfig(num_processes=2, parallel="fsdp").identity()


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.gpu
@pytest.mark.skipif(num_gpus() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_train_to_the_losses_of_one(step, parallel):
    single, double = step("single"), step("double")
    settings = SETTINGS | {"dropout": 0.0, "device": "cuda", "attention": "sdpa", "precision": "bfloat16"}
    expected = single(**settings | {"num_processes": 1})
    numbers = double(**settings | {"parallel": parallel})
    # bf16 products, added in another order.
    assert numbers["train_loss"] == pytest.approx(expected["train_loss"], rel=0.01)
    assert numbers["tokens"] == expected["tokens"]
