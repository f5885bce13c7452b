"""Retry training with smaller micro-batches when memory runs out; the optimizer step stays the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from components.train_qlora import history
from components.train_qlora.batching import process_micro_batch_size, with_micro_batch_size, with_noted_size
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress
from qlora_retrain.lm import checkpoints

Result = TypeVar("Result")


def retry_with_smaller_micro_batches(
    config: TrainConfig, scratch: Path, train: Callable[[TrainConfig], Result]
) -> tuple[Result, TrainConfig, list[str]]:
    """Call `train` with the config, and with half the micro-batch size each time that memory runs out.

    If memory ran out in an earlier attempt, or the setting is `auto`, start with the micro-batch size of the newest
    checkpoint in `scratch`.

    Returns:
        The result of `train`, the config that it succeeded with, and a sentence for each time that memory ran out.

    Raises:
        MemoryError: With the numbers, if a single row per micro-batch is too much.
    """
    oom_messages = list[str]()

    # An earlier attempt found a size that fits, so trying larger ones again would only cost time.
    size = _newest_checkpoint_size(config, scratch)
    if size is None:
        pass
    elif config.micro_batch_size == "auto":
        progress.say(f"train.micro_batch_size: auto; {size}, as in the newest checkpoint")
        config = with_micro_batch_size(config, size)
    elif size < config.micro_batch_size:
        oom_messages.append(
            f"out of memory in an earlier attempt, which continued with a micro-batch size of {size}, "
            f"{config.global_batch_size // size} per step"
        )
        progress.say(f"{oom_messages[-1]}; this attempt uses the same size")
        config = with_micro_batch_size(config, size)

    while True:
        try:
            return train(config), with_noted_size(config, scratch), oom_messages
        except MemoryError as error:
            oom_messages.append(str(error))
            config = with_noted_size(config, scratch)

        # Only a divisor of the global batch size cuts the step into equal micro-batches.
        step_rows = config.global_batch_size
        smaller_sizes = [rows for rows in range(1, process_micro_batch_size(config) // 2 + 1) if step_rows % rows == 0]
        if not smaller_sizes:
            raise MemoryError(
                f"{oom_messages[-1]}. A micro-batch of one row cannot be split further: lower train.rank, shorten the "
                "rows or give the step more memory"
            )
        progress.say(
            f"{oom_messages[-1]}: continuing with a micro-batch size of {smaller_sizes[-1]}, "
            f"{step_rows // smaller_sizes[-1]} per step"
        )
        config = with_micro_batch_size(config, smaller_sizes[-1])


def _newest_checkpoint_size(config: TrainConfig, scratch: Path) -> int | None:
    """Return the micro-batch size of the newest checkpoint's last step; None where there is no usable one.

    The checkpoint is not verified here, since the training process does that: a wrong number costs only speed or
    another attempt.
    """
    newest = checkpoints.sorted_checkpoints(scratch)[-1:]
    try:
        with (newest[0] / history.STATE_FILE).open("rb") as file:
            state = json.loads(file.read(history.max_state_bytes(checkpoints.step_of(newest[0]))))
        size = history.last_batch_size(state["log"])
        # A size from another recipe, or from a damaged file, may not divide the batch.
        if type(size) is int and size > 0 and config.global_batch_size % size == 0:
            return size
    except (IndexError, OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
