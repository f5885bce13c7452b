"""Check that a checkpoint whose files verify can be resumed from, before anything of it changes the run.

Its hashes say that it is whole, and not that this run wrote it. So every file that resuming reads is loaded here as
data (safetensors, JSON, and torch's files with `weights_only`, which runs no code) and compared with what this model,
optimizer and schedule would save: names, shapes, settings and counts. What differs is the reason to pass it over.
"""

from __future__ import annotations

import json
import math
import random
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from components.train_qlora import adapter, history
from qlora_retrain.lm import checkpoints, oom

if TYPE_CHECKING:
    from components.train_qlora.trainer import AdapterTrainer

ADAPTER_FOLDER = "adapter"  # in a checkpoint: a folder that PEFT can load as it is
BEST_FOLDER = "best"  # in a checkpoint: the same, with the weights of the lowest evaluation loss so far
STATE_FILE = "trainer_state.json"

_ADAPTER_FILES = {f"{ADAPTER_FOLDER}/{name}" for name in (adapter.CONFIG_FILE, adapter.WEIGHTS_FILE)}
_BEST_FILES = {f"{BEST_FOLDER}/{name}" for name in (adapter.CONFIG_FILE, adapter.WEIGHTS_FILE)}
_REQUIRED_FILES = {STATE_FILE, "optimizer.pt", "scheduler.pt"} | _ADAPTER_FILES
_RNG_FILE = re.compile(r"rng_state(_[0-9]+)?\.pth")  # one for each process that saved
# The states of the schedule and of the generators have some kilobytes.
_MAX_SMALL_FILE_BYTES = 2**20
_MAX_OVERHEAD_BYTES = 4096  # beside a tensor in a file: its name, shape and type, and padding
# What the Trainer's own state says, and this project's runs never change.
_VARYING_FIELDS = {
    "epoch", "global_step", "log_history", "logging_steps", "max_steps", "num_train_epochs", "stateful_callbacks",
    "train_batch_size",
}  # fmt: skip


class _Unusable(Exception):
    """The checkpoint does not fit this run; the text says why."""


def unusable_reason(trainer: AdapterTrainer, folder: Path) -> str | None:
    """Return why a checkpoint that verifies cannot be resumed from; None where all of it fits this run.

    Raises:
        MemoryError: If memory runs out, which says nothing about the checkpoint.
    """
    step = checkpoints.step_of(folder)
    try:
        _check_names(folder)
        log = _check_state(trainer, folder / STATE_FILE, step)
        has_best, has_evaluations = (folder / BEST_FOLDER).is_dir(), bool(history.eval_losses(log))
        _expect("whether it has the best weights so far", has_best, has_evaluations)
        for name in (ADAPTER_FOLDER, BEST_FOLDER) if has_best else (ADAPTER_FOLDER,):
            _check_weights(trainer, folder / name)
        _check_optimizer(trainer, folder, step)
        for path in folder.glob("rng_state*.pth"):
            _check_random_state(path)
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


def _check_names(folder: Path) -> None:
    """Allow the files that this trainer writes: the Trainer would look for others, or go on without a missing one."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = {name for name in names if not _RNG_FILE.fullmatch(name)} - {checkpoints.MARKER}
    if missing := sorted((_REQUIRED_FILES | (_BEST_FILES if names & _BEST_FILES else set())) - names):
        raise _Unusable(f"has no {missing[0]}")
    if extra := sorted(names - _REQUIRED_FILES - _BEST_FILES):
        raise _Unusable(f"has {extra[0]}, which this trainer never writes")


def _check_state(trainer: AdapterTrainer, path: Path, step: int) -> list[dict[str, Any]]:
    """Check the counts and the log of the run so far, and return the log."""
    total_steps = trainer.training_control.total_steps
    if not 0 < step <= total_steps:
        raise _Unusable(f"is of step {step}, and the run has {total_steps}")
    if path.stat().st_size > history.max_state_bytes(step):
        raise _Unusable(f"{path.name} has {path.stat().st_size} bytes, too many for {step} steps")

    document = json.loads(path.read_bytes())
    expected = vars(TrainerState(max_steps=total_steps, global_step=step, logging_steps=trainer.args.logging_steps))
    expected |= {"train_batch_size": trainer.args.train_batch_size}
    _expect("its fields", sorted(document), sorted(expected))
    for name in expected.keys() - _VARYING_FIELDS | {"global_step", "logging_steps", "max_steps", "train_batch_size"}:
        _expect(f"{path.name}: {name}", document[name], expected[name])
    if not isinstance(document["stateful_callbacks"], dict):
        raise _Unusable(f"{path.name}: stateful_callbacks is no object")

    log: list[dict[str, Any]] = document["log_history"]
    _check_log(log, step, trainer.training_control.eval_at_steps)
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


def _check_weights(trainer: AdapterTrainer, folder: Path) -> None:
    expected = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    _refuse_large(folder / adapter.WEIGHTS_FILE, expected.values())
    weights = adapter.load_weights(folder)
    _expect_tensors(f"{folder.name}/{adapter.WEIGHTS_FILE}", weights, expected)


def _refuse_large(path: Path, tensors: Collection[torch.Tensor] = ()) -> None:
    """Refuse a file that is larger than these tensors and what describes them, before it is in memory."""
    max_bytes = _MAX_SMALL_FILE_BYTES + sum(tensor.nbytes + _MAX_OVERHEAD_BYTES for tensor in tensors)
    if path.stat().st_size > max_bytes:
        raise _Unusable(f"{path.name} has {path.stat().st_size} bytes, more than {max_bytes}")


def _expect_tensors(name: str, tensors: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, shapes and types, and refuse numbers that are not finite: training would end with them (14)."""
    _expect(f"the tensors of {name}", sorted(tensors), sorted(expected))
    for key, tensor in tensors.items():
        _expect(f"{name}: {key}", _describe(tensor), _describe(expected[key]))
        if not torch.isfinite(tensor).all():
            raise _Unusable(f"{name}: {key} has a number that is not finite")


def _describe(tensor: Any) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__


def _check_optimizer(trainer: AdapterTrainer, folder: Path, step: int) -> None:
    """Compare the optimizer's and the schedule's states with those of new ones, brought to this step.

    Both files have settings too (learning rate, betas, weight decay), and loading them would replace the run's own.
    """
    optimizer, scheduler = trainer.create_optimizer(), trainer.create_scheduler(trainer.training_control.total_steps)
    trainer.optimizer, trainer.lr_scheduler, trainer._created_lr_scheduler = None, None, False
    rates = [rate * factor(step) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    expected_schedule = scheduler.state_dict() | {
        "last_epoch": step, "_step_count": step + 1, "_last_lr": rates, "_is_initial": False,
    }  # fmt: skip
    _expect("scheduler.pt", _load_torch(folder / "scheduler.pt"), expected_schedule)

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected_states = _new_states(trainer, parameters)
    stored = _load_torch(folder / "optimizer.pt", [tensor for state in expected_states for tensor in state.values()])
    expected_groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(expected_groups, rates, strict=True):
        group["lr"] = rate
    _expect("optimizer.pt: its parts", sorted(stored), ["param_groups", "state"])
    _expect("optimizer.pt: param_groups", stored["param_groups"], expected_groups)

    _expect("optimizer.pt: its parameters", sorted(stored["state"]), list(range(len(parameters))))
    for i, expected in enumerate(expected_states):
        state = dict(stored["state"][i])
        # bitsandbytes wraps the tensors of its state once more.
        tensors = state.pop(optimizer._FSDP_WRAPPED_QUANT_STATE_KEY, {})
        _expect(f"optimizer.pt: the count of parameter {i}", state, {"step": step})
        _expect_tensors(f"optimizer.pt: parameter {i}", tensors, expected)


def _new_states(trainer: AdapterTrainer, parameters: Iterable[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors that the optimizer keeps for each parameter; on the meta device, where they take no memory."""
    twins = [torch.nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    optimizer = optimizer_class(twins, **options | {"is_paged": False})
    for i, twin in enumerate(twins):
        optimizer.init_state(optimizer.param_groups[0], twin, 0, i)
    return [{k: v for k, v in optimizer.state[twin].items() if isinstance(v, torch.Tensor)} for twin in twins]


def _check_random_state(path: Path) -> None:
    """Set generators of no use to the states of the file."""
    with safe_globals():
        state = _load_torch(path)
    random.Random().setstate(state["python"])  # noqa: S311 - no secret is drawn
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def _load_torch(path: Path, tensors: Collection[torch.Tensor] = ()) -> Any:
    """Load a file of torch's as data; `weights_only` builds tensors and plain values, and calls nothing else."""
    _refuse_large(path, tensors)
    # torch compresses nothing. A compressed part may take any amount of memory.
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise _Unusable(f"{path.name} has compressed parts")
    # Mapped, so that only what is looked at is read.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
