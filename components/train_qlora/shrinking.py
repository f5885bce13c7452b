"""When memory runs out: the same optimizer step in smaller passes, as long as there is anything left to halve."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qlora_retrain import progress
from qlora_retrain.config.sections import TrainConfig

Trained = TypeVar("Trained")


def shrinking(config: TrainConfig, train: Callable[[TrainConfig], Trained]) -> tuple[Trained, TrainConfig, list[str]]:
    """Call `train` with the config, with half the rows a pass each time that memory runs out.

    Returns:
        What `train` returned, the config that it succeeded with, and a sentence for each time that it did not.

    Raises:
        MemoryError: With the numbers, if a single row a pass is too much.
    """
    told = list[str]()
    while True:
        try:
            return train(config), config, told
        except MemoryError as error:
            told.append(str(error))
        a_step = config.rows_a_step
        smaller = [rows for rows in range(1, config.rows_a_pass // 2 + 1) if a_step % rows == 0]
        if not smaller:
            raise MemoryError(f"{told[-1]}. Nothing is left to halve: take a smaller rank, shorter rows or more memory")
        changed = {"batch_size": smaller[-1], "gradient_accumulation": a_step // smaller[-1]}
        progress.say(f"{told[-1]}: going on with {smaller[-1]} x {changed['gradient_accumulation']}")
        config = config.model_copy(update=changed)
