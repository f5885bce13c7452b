"""Memory that runs out, as whoever asks for it learns of it: torch refuses, in one of many words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from components.train_qlora.watch import memory_mib
from qlora_retrain.config.sections import TrainConfig

SAYING_SO = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def noted(config: TrainConfig, longest: int) -> Iterator[None]:
    """Have memory that runs out in the block be a `MemoryError` with the numbers, of the process that it happens to."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory with {config.rows_a_pass} rows a pass, the longest row having {longest} tokens, "
            f"{memory_mib(config.device)} MiB held; {str(error).splitlines()[0]}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Python's, the GPU's (its libraries' too), and the host's as torch says it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in SAYING_SO)
