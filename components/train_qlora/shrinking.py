"""When memory runs out: the same optimizer step in smaller passes, as long as there is anything left to halve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from components.train_qlora import history
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress
from qlora_retrain.lm import checkpoints

Trained = TypeVar("Trained")


def shrinking(
    config: TrainConfig, scratch: Path, train: Callable[[TrainConfig], Trained]
) -> tuple[Trained, TrainConfig, list[str]]:
    """Call `train` with the config, with half the rows a pass each time that memory runs out.

    Where it ran out in an earlier try, begin with the passes that the newest checkpoint in `scratch` was made with.

    Returns:
        What `train` returned, the config that it succeeded with, and a sentence for each time that it did not.

    Raises:
        MemoryError: With the numbers, if a single row a pass is too much.
    """
    told = list[str]()
    before = _batch_size_before(config, scratch)
    if before < config.batch_size:
        told.append(f"out of memory in an earlier try, which went on with {before} x {config.rows_a_step // before}")
        progress.say(f"{told[-1]}: so does this one")
        config = _cut(config, before)
    while True:
        try:
            return train(config), config, told
        except MemoryError as error:
            told.append(str(error))
        a_step = config.rows_a_step
        smaller = [rows for rows in range(1, config.rows_a_pass // 2 + 1) if a_step % rows == 0]
        if not smaller:
            raise MemoryError(f"{told[-1]}. Nothing is left to halve: take a smaller rank, shorter rows or more memory")
        progress.say(f"{told[-1]}: going on with {smaller[-1]} x {a_step // smaller[-1]}")
        config = _cut(config, smaller[-1])


def _cut(config: TrainConfig, rows: int) -> TrainConfig:
    """The same step in passes of so many rows."""
    return config.model_copy(update={"batch_size": rows, "gradient_accumulation": config.rows_a_step // rows})


def _batch_size_before(config: TrainConfig, scratch: Path) -> int:
    """That of the newest checkpoint's last step; the config's where there is none, or none that can be.

    Whether the checkpoint verifies is for the process that trains from it: a wrong number costs speed or another try.
    """
    newest = checkpoints.found(scratch)[-1:]
    try:
        found = history.batch_size(json.loads((newest[0] / "trainer_state.json").read_text())["log_history"])
        return found if found and found > 0 and config.rows_a_step % found == 0 else config.batch_size
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return config.batch_size
