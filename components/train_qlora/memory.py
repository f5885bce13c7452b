"""When memory runs out: the same optimizer step in smaller passes, as long as there is anything left to halve."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from components.train_qlora.watch import memory_mib
from qlora_retrain import progress
from qlora_retrain.config.sections import TrainConfig

Trained = TypeVar("Trained")
SAYING_SO = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "_STATUS_ALLOC_FAILED")


def rows_a_pass(config: TrainConfig) -> int:
    """The most rows that are in a forward pass of a process."""
    return min(config.batch_size, -(-config.rows_a_step // config.processes))


@contextlib.contextmanager
def noted(config: TrainConfig, longest: int) -> Iterator[None]:
    """Have memory that runs out in the block be a `MemoryError` with the numbers, of the process that it happens to."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory with {rows_a_pass(config)} rows a pass, the longest row having {longest} tokens, "
            f"{memory_mib()} MiB held; {str(error).splitlines()[0]}"
        ) from error


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
        smaller = [rows for rows in range(1, rows_a_pass(config) // 2 + 1) if a_step % rows == 0]
        if not smaller:
            raise MemoryError(f"{told[-1]}. Nothing is left to halve: take a smaller rank, shorter rows or more memory")
        changed = {"batch_size": smaller[-1], "gradient_accumulation": a_step // smaller[-1]}
        progress.say(f"{told[-1]}: going on with {smaller[-1]} x {changed['gradient_accumulation']}")
        config = config.model_copy(update=changed)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Python's, the GPU's (its libraries' too), and the host's as torch says it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in SAYING_SO)
