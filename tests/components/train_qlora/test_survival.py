"""What happens to pods: killed at any moment, memory and disks that are full, checkpoints that are harmed."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.train_qlora import memory, packed
from components.train_qlora import trainer as trainer_module
from components.train_qlora.shrinking import shrinking
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.lm import checkpoints


def killed_again_and_again(step, program, kills: int, optimizer: str) -> None:
    """Kill the step at random moments, most of them inside saves, so often; then it ends bit-equal."""
    settings = {
        "rank": 64, "alpha": 64, "dropout": 0.1, "learning_rate": 5e-3, "batch_size": 4, "gradient_accumulation": 2,
        "max_steps": 8 * kills + 8, "optimizer": optimizer, "evaluations": 5, "device": "cpu", "precision": "float32",
        "attention": "eager", "checkpoint_minutes": 1e-9,
    }  # fmt: skip
    whole, parts, moments = step("whole"), step("parts"), random.Random(0)
    whole(**settings)
    reached, inside = 0, 0
    for number in range(kills):
        running = program(parts, **settings)
        process = running.process
        process.stdout.readline()  # ready
        goal = parts.scratch / f"checkpoint-{reached + moments.randint(1, 4)}"
        until = time.monotonic() + (moments.uniform(0, 1) if number % 5 == 4 else 60)  # now and then while it starts
        while not goal.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        code, _, errors = running.ended()
        assert code == -signal.SIGKILL, errors
        inside += any(not (folder / checkpoints.MARKER).exists() for folder in checkpoints.found(parts.scratch))
        newest = checkpoints.newest_valid(parts.scratch)
        before, reached = reached, checkpoints.step_of(newest) if newest else 0
        assert reached >= before, "a kill lost a step that had been saved"
    assert reached > 0
    assert inside > kills // 4, "few of the kills were inside a save"
    code, _, errors = program(parts, **settings).ended()
    assert code == 0, errors
    assert parts.weights == whole.weights
    assert (parts.adapter / "loss.jsonl").read_text() == (whole.adapter / "loss.jsonl").read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_bytes_of_one_that_was_not(step, program):
    killed_again_and_again(step, program, kills=3, optimizer="paged_adamw_32bit")


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_run_that_is_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(step, program, optimizer):
    killed_again_and_again(step, program, kills=20, optimizer=optimizer)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    file.write_bytes(spoilt)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: cut_off(folder / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors has"),
        (lambda folder: flip_a_bit(folder / "optimizer.pt"), "optimizer.pt has another sha256"),
        (lambda folder: [(folder / name).unlink() for name in ("scheduler.pt", "rng_state.pth")], " is missing"),
    ],
    ids=["truncated", "bit-flipped", "half-deleted"],
)
def test_a_harmed_checkpoint_is_passed_over_and_the_run_ends_the_same(step, monkeypatch, capsys, harm, reason):
    whole, parts = step("whole"), step("parts")
    whole(max_steps=5)
    asked = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr("qlora_retrain.core.signals.requested", lambda: next(asked) >= 4)
        with pytest.raises(TryAgain):
            parts(max_steps=5, checkpoint_minutes=1e-9)
    newest = checkpoints.found(parts.scratch)[-1]
    harm(newest)
    parts(max_steps=5)
    said = capsys.readouterr().out
    assert f"passed over {newest.name}: " in said
    assert reason in said
    assert parts.weights == whole.weights


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [False, True], ids=["the step", "all its processes"])
def test_a_stop_in_the_middle_is_saved_within_seconds(step, program, everybody):
    run = step()
    running = program(run, max_steps=5000)
    assert any('"training"' in line for line in running.process.stdout), "it trains"
    asked = time.monotonic()
    process = psutil.Process(running.process.pid)
    for one in [*(process.children(recursive=True) if everybody else []), process]:
        one.terminate()
    code, _, errors = running.ended()
    assert time.monotonic() - asked < 10  # a pod has 120 s
    assert code == 75
    assert "saved as checkpoint-" in errors
    assert "asked to stop" in errors
    assert checkpoints.newest_valid(run.scratch)


@pytest.mark.slow
def test_a_crash_once_the_result_is_told_costs_nothing(step, program):
    """As of a driver or a library while the interpreter ends: the next try would crash just so."""
    run = step()
    code, said, errors = program(run, "late:0", max_steps=2).ended()
    assert code == 0, errors
    assert json.loads(said.splitlines()[-1])["steps"] == 2


@pytest.mark.slow
def test_a_death_is_noticed_though_something_holds_the_pipe_open(step, program):
    running = program(step(), "orphan:3", checkpoint_minutes=1e-9)
    assert running.process.wait(timeout=300) == 75
    assert running.session(), "it is there still"
    _, _, errors = running.ended()
    assert "the process that trains was ended by SIGKILL" in errors


def test_what_a_killed_process_left_half_written_is_not_part_of_the_adapter(step, program):
    run = step()
    run.adapter.mkdir()
    (run.adapter / ".tmpzQixOn").write_bytes(b"half of it")
    code, _, errors = program(run, max_steps=2).ended()
    assert code == 0, errors
    assert not (run.adapter / ".tmpzQixOn").exists()


@pytest.mark.slow
def test_a_run_that_is_short_of_memory_goes_on_with_smaller_passes_and_says_so(step, program):
    run = step(train=64, mark=lambda text: text.replace("order", "order " * 300))
    code, output, errors = program(run, "limit:350", batch_size=32, gradient_accumulation=1, max_steps=2).ended()
    assert code == 0, errors[-3000:]
    papers = run.papers
    assert papers["rows_a_pass"] < 32
    assert len(papers["out_of_memory"]) >= 1
    assert "out of memory with 32 rows a pass, the longest row having" in papers["out_of_memory"][0]
    assert f"going on with {papers['rows_a_pass']} x {32 // papers['rows_a_pass']}" in output
    assert "out of memory with 32 rows a pass" in (run.adapter / "report.html").read_text()


def test_a_try_after_memory_ran_out_begins_with_the_smaller_passes_and_the_papers_say_why(step, monkeypatch):
    run, asked = step(), iter(range(100))
    plain = trainer_module.summed_loss

    def short_of_memory(model: Any, batch: Any) -> Any:
        if len(batch["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(model, batch)

    monkeypatch.setattr(trainer_module, "summed_loss", short_of_memory)
    monkeypatch.setattr(packed, "can_pack", lambda _: False)  # so that rows a pass are what the config says
    with monkeypatch.context() as patch:
        patch.setattr(signals, "requested", lambda: next(asked) >= 6)
        with pytest.raises(TryAgain, match="saved as checkpoint-"):
            run()
    monkeypatch.setattr(trainer_module, "summed_loss", plain)  # this try would have memory enough
    numbers = run()
    assert (numbers["rows_a_pass"], numbers["out_of_memory"]) == (2, 1)
    assert run.papers["out_of_memory"] == ["out of memory in an earlier try, which went on with 2 x 4"]
    assert "out of memory in an earlier try, which went on with 2 x 4" in (run.adapter / "report.html").read_text()


@pytest.mark.parametrize(
    "state",
    [
        '{"log_history": [{"batch_size": 3}]}',
        '{"log_history": [{"batch_size": -2}]}',
        '{"log_history": [{"loss": 1.0}]}',
        "{",
        "[]",
    ],
)
def test_a_checkpoint_that_does_not_say_how_it_was_made_changes_nothing(tmp_path, state):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(state)
    config = TrainConfig(batch_size=4, gradient_accumulation=2)
    assert shrinking(config, tmp_path, lambda config: config.batch_size) == (4, config, [])


def test_passes_are_halved_as_long_as_the_step_stays_the_same(tmp_path):
    tried: list[tuple[int, int]] = []

    def train(config: TrainConfig) -> str:
        tried.append((config.batch_size, config.gradient_accumulation))
        with memory.noted(config, 77):
            if config.batch_size > 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return "trained"

    config = TrainConfig(batch_size=10, gradient_accumulation=3)
    result, used, told = shrinking(config, tmp_path, train)
    assert result == "trained"
    assert tried == [(10, 3), (5, 6), (2, 15)]
    assert (used.batch_size, used.gradient_accumulation, len(told)) == (2, 15, 2)


def test_memory_that_does_not_do_for_one_row_ends_the_run_with_the_numbers(tmp_path):
    def train(config: TrainConfig) -> None:
        with memory.noted(config, 77):
            raise MemoryError("no more")

    with pytest.raises(
        MemoryError, match=r"with 1 rows a pass, the longest row having 77 tokens, \d+ MiB held; no more"
    ):
        shrinking(TrainConfig(batch_size=2), tmp_path, train)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    ],
)
def test_what_libraries_say_of_memory_is_understood(words):
    assert memory.is_out_of_memory(RuntimeError(words))


def test_an_error_that_is_not_about_memory_is_left_alone(tmp_path):
    def train(config: TrainConfig) -> None:
        with memory.noted(config, 77):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        shrinking(TrainConfig(batch_size=2), tmp_path, train)


def test_a_full_disk_ends_the_try_and_harms_nothing(step, small_disk):
    """The scratch folder is a real file system with no room for a second checkpoint."""
    run = step()
    with small_disk(run.scratch, "700k"):
        with pytest.raises(TryAgain, match="no space for a checkpoint in scratch; free some and run it again"):
            run(checkpoint_minutes=1e-9, rank=16)
        assert all(checkpoints.verify(folder) is None for folder in checkpoints.found(run.scratch))


def test_old_checkpoints_go(step):
    run = step()
    run(checkpoint_minutes=1e-9, max_steps=6)
    assert [folder.name for folder in checkpoints.found(run.scratch)] == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_a_cpu(step):
    on_cpu, on_gpu = step("cpu"), step("gpu")
    one = on_cpu(dropout=0.0)
    other = on_gpu(dropout=0.0, device="cuda", attention="sdpa")
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=0.01)
    paged = int(other["optimizer"].split(", ")[1].split()[0])
    assert paged > 0, other["optimizer"]


@pytest.mark.gpu
def test_a_run_on_a_gpu_uses_dropout_and_comes_back_from_a_checkpoint(step):
    run = step()
    with pytest.raises(TryAgain):
        run(device="cuda", attention="sdpa", precision="bfloat16", max_hours=1e-9)
    assert run(device="cuda", attention="sdpa", precision="bfloat16")["steps"] == 14
