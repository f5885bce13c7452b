"""What happens to pods: kills at any moment, memory that runs out, full disks, damaged checkpoints."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.train_qlora import packing
from components.train_qlora import train as training
from components.train_qlora.processes import memory_error
from components.train_qlora.processes.oom_retry import retry_with_smaller_micro_batches
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.lm import checkpoints, oom


def stop_inside_a_save(process, scratch: Path) -> None:
    """Stop the training process in the middle of a save, however fast or slow the machine is."""
    newest = max(map(checkpoints.step_of, checkpoints.sorted_checkpoints(scratch)), default=0)

    def is_saving() -> bool:
        # What an earlier kill left is not being saved now.
        folders = [f for f in checkpoints.sorted_checkpoints(scratch) if checkpoints.step_of(f) > newest]
        return any(not (folder / checkpoints.MARKER).exists() for folder in folders)

    while process.poll() is None:
        if is_saving():
            workers = psutil.Process(process.pid).children(recursive=True)
            for worker in workers:
                worker.suspend()
            if is_saving():
                return
            for worker in workers:
                worker.resume()
        time.sleep(0.001)


def assert_survives_kills(step, program, kills: int, optimizer: str) -> None:
    """Kill the step at random moments, most of them inside saves, and then let it end; the bytes must be the same."""
    settings = {
        "rank": 64, "alpha": 64, "dropout": 0.1, "learning_rate": 5e-3, "micro_batch_size": 4, "global_batch_size": 8,
        "max_steps": 8 * kills + 8, "optimizer": optimizer, "num_evals": 5, "device": "cpu", "precision": "float32",
        "attention": "eager", "checkpoint_minutes": 1e-9,
    }  # fmt: skip
    whole, parts, rng = step("whole"), step("parts"), random.Random(0)
    whole(**settings)

    reached, kills_inside_a_save = 0, 0
    for number in range(kills):
        running = program(parts, **settings)
        process = running.process
        process.stdout.readline()  # ready
        if number % 5 == 4:  # while the step starts, or soon after
            time.sleep(rng.uniform(0, 1))
        elif number % 2 == 0:
            stop_inside_a_save(process, parts.scratch)
        else:
            goal = parts.scratch / f"checkpoint-{reached + rng.randint(1, 4)}"
            while not goal.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        exit_code, _, stderr = running.finish()
        assert exit_code == -signal.SIGKILL, stderr

        kills_inside_a_save += any(
            not (folder / checkpoints.MARKER).exists() for folder in checkpoints.sorted_checkpoints(parts.scratch)
        )
        newest = checkpoints.newest_valid(parts.scratch)
        before, reached = reached, checkpoints.step_of(newest) if newest else 0
        assert reached >= before, "a kill lost a step that had been saved"

    assert reached > 0
    assert kills_inside_a_save > kills // 4, "few of the kills were inside a save"
    exit_code, _, stderr = program(parts, **settings).finish()
    assert exit_code == 0, stderr
    assert parts.weights == whole.weights
    assert (parts.adapter / "loss.jsonl").read_text() == (whole.adapter / "loss.jsonl").read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_bytes_of_one_that_was_not(step, program):
    assert_survives_kills(step, program, kills=3, optimizer="paged_adamw_32bit")


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_run_that_is_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(step, program, optimizer):
    assert_survives_kills(step, program, kills=20, optimizer=optimizer)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: truncate(folder / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors has"),
        (lambda folder: flip_a_bit(folder / "optimizer.safetensors"), "optimizer.safetensors has another sha256"),
        (lambda folder: [(folder / name).unlink() for name in ("state.json", "random_0.safetensors")], " is missing"),
    ],
    ids=["truncated", "bit-flipped", "half-deleted"],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(step, monkeypatch, capsys, damage, reason):
    whole, parts = step("whole"), step("parts")
    whole(max_steps=5)
    # Stopped after step 4 of 5, with a checkpoint after every step.
    checks = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr("qlora_retrain.core.signals.stop_requested", lambda: next(checks) >= 4)
        with pytest.raises(TryAgain):
            parts(max_steps=5, checkpoint_minutes=1e-9)

    # The one before it is still valid, and its steps are computed again.
    newest = checkpoints.sorted_checkpoints(parts.scratch)[-1]
    damage(newest)
    parts(max_steps=5)
    output = capsys.readouterr().out
    assert f"skipped {newest.name}: " in output
    assert reason in output
    assert parts.weights == whole.weights


@pytest.mark.slow
@pytest.mark.parametrize("signal_all", [False, True], ids=["the step", "all its processes"])
def test_a_stop_while_training_is_saved_within_seconds(step, program, signal_all):
    run = step()
    # Kubernetes signals the container's first process; a person's Ctrl-C signals all of them.
    running = program(run, max_steps=5000)
    assert any('"training"' in line for line in running.process.stdout), "it trains"

    stop_time = time.monotonic()
    process = psutil.Process(running.process.pid)
    for target in [*(process.children(recursive=True) if signal_all else []), process]:
        target.terminate()
    exit_code, _, stderr = running.finish()
    # What a pod is given. On a quiet machine it takes a second; 5000 steps would take longer than the limit.
    assert time.monotonic() - stop_time < 120
    assert exit_code == 75
    assert "saved as checkpoint-" in stderr
    assert "asked to stop" in stderr
    assert checkpoints.newest_valid(run.scratch)


@pytest.mark.slow
def test_a_crash_after_the_result_was_sent_is_ignored(step, program):
    """A driver or a library may crash while the interpreter exits, and would crash in the next attempt just so."""
    run = step()
    exit_code, stdout, stderr = program(run, "late:0", max_steps=2).finish()
    assert exit_code == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["steps"] == 2


@pytest.mark.slow
def test_the_death_of_a_worker_is_noticed_though_an_orphan_holds_its_pipe_open(step, program):
    # The orphan holds the writing end for longer than this waits, so the pipe's end alone would be noticed too late.
    running = program(step(), "orphan:3", checkpoint_minutes=1e-9)
    assert running.process.wait(timeout=300) == 75
    orphans = running.session_processes()
    assert orphans, "the orphan is still there"
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    _, _, stderr = running.finish()
    assert "the training process was ended by SIGKILL" in stderr


def test_a_half_written_file_of_a_killed_process_is_not_part_of_the_adapter(step, program):
    # As a library leaves it that writes under a temporary name, and is killed before it renames the file.
    run = step()
    run.adapter.mkdir()
    (run.adapter / ".tmpzQixOn").write_bytes(b"half of it")
    exit_code, _, stderr = program(run, max_steps=2).finish()
    assert exit_code == 0, stderr
    assert not (run.adapter / ".tmpzQixOn").exists()


@pytest.mark.slow
def test_a_run_that_is_short_of_memory_continues_with_smaller_micro_batches_and_says_so(step, program):
    # 350 MiB beyond torch hold a few rows of some 300 tokens, and not 32.
    run = step(train=64, edit=lambda text: text.replace("order", "order " * 300))
    exit_code, output, stderr = program(
        run, "limit:350", micro_batch_size=32, global_batch_size=32, max_steps=2
    ).finish()
    assert exit_code == 0, stderr[-3000:]

    # How often it must halve depends on what the libraries of this machine take.
    document = run.document
    rows = document["micro_batch_size"]
    assert rows < 32
    assert len(document["out_of_memory"]) >= 1
    assert "out of memory with a micro-batch size of 32 (the longest row has" in document["out_of_memory"][0]
    assert f"continuing with a micro-batch size of {rows}, {32 // rows} per step" in output
    assert "out of memory with a micro-batch size of 32" in (run.adapter / "report.html").read_text()


def test_an_attempt_after_memory_ran_out_starts_with_the_smaller_micro_batches_and_reports_why(step, monkeypatch):
    run, checks = step(), iter(range(100))
    correct_loss = training.summed_loss

    def loss_short_of_memory(model: Any, batch: Any) -> Any:
        if batch.num_rows > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return correct_loss(model, batch)

    # Without packing a micro-batch has exactly as many rows as the config says.
    monkeypatch.setattr(training, "summed_loss", loss_short_of_memory)
    monkeypatch.setattr(packing, "can_pack", lambda _: False)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: next(checks) >= 6)
        with pytest.raises(TryAgain, match="saved as checkpoint-"):
            run()

    # The second attempt would have enough memory for the larger ones.
    monkeypatch.setattr(training, "summed_loss", correct_loss)
    numbers = run()
    message = "out of memory in an earlier attempt, which continued with a micro-batch size of 2, 4 per step"
    assert (numbers["micro_batch_size"], numbers["out_of_memory"]) == (2, 1)
    assert run.document["out_of_memory"] == [message]
    assert message in (run.adapter / "report.html").read_text()


@pytest.mark.parametrize(
    "state",
    [
        '{"log": [{"batch_size": 3}]}',
        '{"log": [{"batch_size": -2}]}',
        '{"log": [{"loss": 1.0}]}',
        "{",
        "[]",
        "[" * 100_000,
        '{"log": [{"batch_size": 2.0}]}',
        '{"log": [{"batch_size": 2}], "padding": "' + "x" * 2_000_000 + '"}',
    ],
    ids=lambda state: state[:40],
)
def test_a_checkpoint_without_a_usable_batch_size_changes_nothing(tmp_path, state):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text(state)
    config = TrainConfig(micro_batch_size=4, global_batch_size=8)
    assert retry_with_smaller_micro_batches(config, tmp_path, lambda config: config.micro_batch_size) == (4, config, [])


def test_micro_batches_are_halved_to_divisors_of_the_global_batch(tmp_path):
    sizes: list[tuple[int, int]] = []

    def train(config: TrainConfig) -> str:
        sizes.append((config.micro_batch_size, config.global_batch_size // config.micro_batch_size))
        with memory_error.as_memory_error(config, 77, Path()):
            if config.micro_batch_size > 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return "trained"

    config = TrainConfig(micro_batch_size=10, global_batch_size=30)
    result, final_config, oom_messages = retry_with_smaller_micro_batches(config, tmp_path, train)
    # 2 and not 3, which is more than half of 5.
    assert result == "trained"
    assert sizes == [(10, 3), (5, 6), (2, 15)]
    assert (final_config.micro_batch_size, final_config.global_batch_size) == (2, 30)
    assert len(oom_messages) == 2


def test_running_out_of_memory_with_one_row_ends_the_run_with_the_numbers(tmp_path):
    def train(config: TrainConfig) -> None:
        with memory_error.as_memory_error(config, 77, Path()):
            raise MemoryError("no more")

    with pytest.raises(
        MemoryError, match=r"with a micro-batch size of 1 \(the longest row has 77 tokens, \d+ MiB in use\): no more"
    ):
        retry_with_smaller_micro_batches(TrainConfig(micro_batch_size=2, global_batch_size=2), tmp_path, train)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    ],
)
def test_every_librarys_out_of_memory_error_is_recognized(message):
    assert oom.is_out_of_memory(RuntimeError(message))


def test_an_error_that_is_not_about_memory_is_raised_as_it_is(tmp_path):
    def train(config: TrainConfig) -> None:
        with memory_error.as_memory_error(config, 77, Path()):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        retry_with_smaller_micro_batches(TrainConfig(micro_batch_size=2, global_batch_size=2), tmp_path, train)


def test_a_full_disk_ends_the_attempt_and_damages_nothing(step, small_disk):
    """The scratch folder is a real file system with no room for a second checkpoint."""
    run = step()
    with small_disk(run.scratch, "700k"):
        with pytest.raises(TryAgain, match="no space for a checkpoint in scratch; free some space"):
            run(checkpoint_minutes=1e-9, rank=16)
        assert all(checkpoints.invalid_reason(folder) is None for folder in checkpoints.sorted_checkpoints(run.scratch))


def test_only_the_last_two_checkpoints_are_kept(step):
    run = step()
    run(checkpoint_minutes=1e-9, max_steps=6)
    assert [folder.name for folder in checkpoints.sorted_checkpoints(run.scratch)] == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_a_cpu(step):
    on_cpu, on_gpu = step("cpu"), step("gpu")
    expected = on_cpu(dropout=0.0)
    numbers = on_gpu(dropout=0.0, device="cuda", attention="sdpa")
    assert numbers["train_loss"] == pytest.approx(expected["train_loss"], rel=0.01)

    # "paged_adamw_32bit, 28 of 56 state tensors paged (...)"
    paged_tensors = int(numbers["optimizer"].split(", ")[1].split()[0])
    assert paged_tensors > 0, numbers["optimizer"]


@pytest.mark.gpu
def test_a_run_on_a_gpu_with_dropout_resumes_from_a_checkpoint(step):
    run = step()
    # The budget ends the first attempt after one step.
    with pytest.raises(UsageError):
        run(device="cuda", attention="sdpa", precision="bfloat16", max_hours=1e-9)
    assert run(device="cuda", attention="sdpa", precision="bfloat16")["steps"] == 14
