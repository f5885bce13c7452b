"""Save a run's state, and go on from the newest checkpoint that verifies and fits this run.

    checkpoint-<step>/adapter/, best/       adapters that PEFT can load as they are; all weights where all train
    checkpoint-<step>/optimizer.safetensors the optimizer's moments
    checkpoint-<step>/random_<rank>.safetensors   the state of the generators that dropout draws from, by process
    checkpoint-<step>/state.json            the step and the log so far

The hashes in its marker say that a checkpoint is whole, and not that this run wrote it. So everything in it is data
(safetensors and JSON, which run no code), and all of it is compared with what this run would save before anything
changes the run: names, shapes, types and counts. What differs is the reason to pass it over.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from errno import ENOSPC
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.train_qlora import adapter, history
from components.train_qlora.processes import distributed
from components.train_qlora.training_run import ADAPTER_FOLDER, BEST_FOLDER, TrainingRun
from qlora_retrain.core.errors import Cause, TryAgain
from qlora_retrain.lm import checkpoints, oom

MAX_CHECKPOINTS = 2
STATE_FILE, OPTIMIZER_FILE = history.STATE_FILE, "optimizer.safetensors"
_MIN_FREE_BYTES = 2**20  # with less free space than this, a failed save is blamed on the full disk
_MAX_OVERHEAD_BYTES = 4096  # beside a tensor in a file: its name, shape and type, and padding


def save(run: TrainingRun) -> None:
    """Write a checkpoint of the run as it is now, and delete all but the newest two.

    Raises:
        TryAgain: If the disk is full.
    """
    folder = run.scratch / f"checkpoint-{run.step}"
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier()
    try:
        save_file(_random_state(run), folder / _random_file(distributed.rank()))
        if distributed.is_main():
            adapter.save(run.model, folder / ADAPTER_FOLDER)
            save_file(run.optimizer.state(), folder / OPTIMIZER_FILE)
            _save_log(run, folder)
        _finish(run, folder)
    except Exception as error:
        # safetensors mentions a full disk only in the text of its own error.
        is_disk_full = os.strerror(ENOSPC) in str(error) or shutil.disk_usage(run.scratch).free < _MIN_FREE_BYTES
        shutil.rmtree(folder, ignore_errors=True)
        if is_disk_full:
            message = f"step {run.step}: no space for a checkpoint in scratch; free some space and run the step again"
            raise TryAgain(message, cause=Cause.DISK_FULL) from error
        raise

    if distributed.is_main():
        for old_folder in checkpoints.sorted_checkpoints(run.scratch)[:-MAX_CHECKPOINTS]:
            shutil.rmtree(old_folder)


def save_evaluation(run: TrainingRun) -> None:
    """Add to the checkpoint of this step what an evaluation after it has found."""
    folder = run.scratch / f"checkpoint-{run.step}"
    if distributed.is_main():
        _save_log(run, folder)
    _finish(run, folder)


def newest(run: TrainingRun) -> Path | None:
    """Return the newest checkpoint that verifies and fits this run, and delete the newer ones."""
    valid = checkpoints.newest_valid(run.scratch, lambda folder: unusable_reason(run, folder))
    first_step = checkpoints.step_of(valid) if valid else 0
    for folder in checkpoints.sorted_checkpoints(run.scratch):
        if checkpoints.step_of(folder) > first_step or valid is None:
            shutil.rmtree(folder)  # its step will be computed and saved again
    history.note_first_step(run.scratch, first_step)
    return valid


def restore(run: TrainingRun, folder: Path) -> None:
    """Bring the run to the state of a checkpoint that `newest` returned."""
    run.step = checkpoints.step_of(folder)
    run.log = _read_log(folder / STATE_FILE)
    adapter.set_weights(run.model, adapter.load_weights(folder / ADAPTER_FOLDER))
    has_best = (folder / BEST_FOLDER).is_dir()
    run.best_weights = adapter.load_weights(folder / BEST_FOLDER) if has_best else None
    run.optimizer.load_state(load_file(folder / OPTIMIZER_FILE), run.step)
    states = load_file(folder / _random_file(distributed.rank()))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _save_log(run: TrainingRun, folder: Path) -> None:
    document = {"step": run.step, "total_steps": run.total_steps, "log": run.log}
    (folder / STATE_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")


def _read_log(path: Path) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = json.loads(path.read_bytes())["log"]
    return log


def _finish(run: TrainingRun, folder: Path) -> None:
    """Write the best weights and the marker, once every process has written its part."""
    distributed.barrier()
    if distributed.is_main():
        if run.best_weights is not None:
            adapter.save_weights(run.model, run.best_weights, folder / ADAPTER_FOLDER, folder / BEST_FOLDER)
        checkpoints.write_marker(folder, run.step)
    distributed.barrier()


def _random_file(rank: int) -> str:
    return f"random_{rank}.safetensors"


def _random_state(run: TrainingRun) -> dict[str, Tensor]:
    """Return the states of the generators that this process draws from."""
    states = {"cpu": torch.get_rng_state()}
    if run.config.device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# What follows checks a checkpoint that verifies, and changes nothing.


class _Unusable(Exception):
    """The checkpoint does not fit this run; the text says why."""


def unusable_reason(run: TrainingRun, folder: Path) -> str | None:
    """Return why a checkpoint that verifies cannot be resumed from; None where all of it fits this run.

    Raises:
        MemoryError: If memory runs out, which says nothing about the checkpoint.
    """
    step = checkpoints.step_of(folder)
    try:
        has_best = (folder / BEST_FOLDER).is_dir()
        _check_names(run, folder, has_best=has_best)
        log = _check_state(run, folder / STATE_FILE, step)
        _expect("whether it has the best weights so far", has_best, bool(history.eval_losses(log)))

        _, weights_file = adapter.checkpoint_files(run.model)
        for name in (ADAPTER_FOLDER, BEST_FOLDER) if has_best else (ADAPTER_FOLDER,):
            _check_tensors(folder, f"{name}/{weights_file}", adapter.weights(run.model))
        _check_tensors(folder, OPTIMIZER_FILE, run.optimizer.empty_state())
        random_state = _random_state(run)
        for rank in range(run.config.num_processes):
            states = _check_tensors(folder, _random_file(rank), random_state)
            # This sets generators of no use; one of them on the GPU.
            for device, state in states.items():
                torch.Generator(device).set_state(state)
    except _Unusable as error:
        return str(error)
    except Exception as error:  # whatever a library says about a file that somebody else wrote
        if oom.is_out_of_memory(error):
            raise
        return f"cannot be loaded: {type(error).__name__}: {str(error)[:200]}"
    return None


def _expect(name: str, value: object, expected: object) -> None:
    if isinstance(value, bool) is not isinstance(expected, bool) or value != expected:
        raise _Unusable(f"{name}: expected {str(expected)[:80]}, found {str(value)[:80]}")


def _check_names(run: TrainingRun, folder: Path, *, has_best: bool) -> None:
    """Allow the files that `save` writes, and no other."""
    expected = {STATE_FILE, OPTIMIZER_FILE, *map(_random_file, range(run.config.num_processes))}
    folders = (ADAPTER_FOLDER, BEST_FOLDER) if has_best else (ADAPTER_FOLDER,)
    expected |= {f"{name}/{file}" for name in folders for file in adapter.checkpoint_files(run.model)}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {checkpoints.MARKER}
    if missing := sorted(expected - names):
        raise _Unusable(f"has no {missing[0]}")
    if extra := sorted(names - expected):
        raise _Unusable(f"has {extra[0]}, which this trainer never writes")


def _check_state(run: TrainingRun, path: Path, step: int) -> list[dict[str, Any]]:
    """Check the counts and the log of the run so far, and return the log."""
    if not 0 < step <= run.total_steps:
        raise _Unusable(f"is of step {step}, and the run has {run.total_steps}")
    if path.stat().st_size > history.max_state_bytes(step):
        raise _Unusable(f"{path.name} has {path.stat().st_size} bytes, too many for {step} steps")

    document = json.loads(path.read_bytes())
    _expect("its fields", sorted(document), ["log", "step", "total_steps"])
    _expect(f"{path.name}: step", document["step"], step)
    _expect(f"{path.name}: total_steps", document["total_steps"], run.total_steps)
    log: list[dict[str, Any]] = document["log"]
    _check_log(log, step, run.eval_at_steps)
    return log


def _check_log(log: list[dict[str, Any]], step: int, eval_at_steps: Iterable[int]) -> None:
    """Check that the log has every step once, in order, evaluations only where they were due, and numbers alone."""
    values = [value for entry in log for value in entry.values()]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise _Unusable("its log has a value that is no finite number")
    steps = [entry["step"] for entry in log if "loss" in entry]
    _expect("the steps in its log", steps, list(range(1, step + 1)))
    step_fields = {*history.STEP_FIELDS, *history.TIMING_FIELDS, "batch_size", "time"}
    for entry in log:
        fields = step_fields if "loss" in entry else {"eval_loss", "epoch", "step", "time"}
        _expect(f"the fields of its log at step {entry.get('step')}", sorted(entry), sorted(fields))
        if "loss" in entry and not (entry["tokens"] >= 0 and entry["tokens_per_second"] > 0):
            raise _Unusable(f"its log has no speed at step {entry['step']}")
    if not {s for s, _ in history.eval_losses(log)} <= set(eval_at_steps):
        raise _Unusable("its log has evaluations at steps at which this run has none")


def _check_tensors(folder: Path, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors, whose names, shapes and types must be the expected ones, and whose numbers finite."""
    _refuse_large(folder / name, expected.values())
    tensors: dict[str, Tensor] = load_file(folder / name)
    _expect(f"the tensors of {name}", sorted(tensors), sorted(expected))
    for key, tensor in tensors.items():
        _expect(f"{name}: {key}", _describe(tensor), _describe(expected[key]))
        # Training would end with such a number (14).
        if not torch.isfinite(tensor).all():
            raise _Unusable(f"{name}: {key} has a number that is not finite")
    return tensors


def _refuse_large(path: Path, tensors: Collection[Tensor]) -> None:
    """Refuse a file that is larger than these tensors and what describes them, before it is in memory."""
    max_bytes = _MAX_OVERHEAD_BYTES + sum(tensor.nbytes + _MAX_OVERHEAD_BYTES for tensor in tensors)
    if path.stat().st_size > max_bytes:
        raise _Unusable(f"{path.name} has {path.stat().st_size} bytes, more than {max_bytes}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
