"""Add the numbers of a training process to its out-of-memory errors, which `lm.oom` recognizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from components.train_qlora.batching import process_micro_batch_size, with_noted_size
from components.train_qlora.control import memory_mib
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import oom


@contextlib.contextmanager
def as_memory_error(config: TrainConfig, max_row_tokens: int, scratch: Path) -> Iterator[None]:
    """Raise every out-of-memory error of the block as `MemoryError`, with the numbers of this process.

    Raises:
        MemoryError: If memory runs out, the host's or the GPU's.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
        if not oom.is_out_of_memory(error):
            raise
        # Only the first line: CUDA's errors continue with advice about environment variables.
        first_line = str(error).partition("\n")[0]
        size = process_micro_batch_size(with_noted_size(config, scratch))
        raise MemoryError(
            f"out of memory with a micro-batch size of {size} (the longest row has "
            f"{max_row_tokens} tokens, {memory_mib(config.device)} MiB in use): {first_line}"
        ) from error
