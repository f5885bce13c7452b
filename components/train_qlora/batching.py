"""Batch sizes that follow from the line's settings.

They are computed here and not in the config models, because code identity hashes this folder but not the config
package. A formula that changed there would change the adapter under an unchanged key.
"""

from __future__ import annotations

from pathlib import Path

from components.train_qlora import history
from qlora_retrain.config.sections import TrainConfig

# With `micro_batch_size: auto`, the rows with which measuring begins where the planner does not know the family.
AUTO_START_ROWS = 16


def micro_batch_size(config: TrainConfig) -> int:
    """Return the rows of a micro-batch as they are set; before `auto` is resolved, `AUTO_START_ROWS`."""
    return AUTO_START_ROWS if config.micro_batch_size == "auto" else config.micro_batch_size


def with_micro_batch_size(config: TrainConfig, size: int) -> TrainConfig:
    """Return the config with this micro-batch size; the global batch size, and so the result, stays the same."""
    return config.model_copy(update={"micro_batch_size": size})


def with_noted_size(config: TrainConfig, scratch: Path) -> TrainConfig:
    """Return the config with the size that a training process has noted, where the setting is `auto`."""
    if config.micro_batch_size != "auto":
        return config
    return with_micro_batch_size(config, history.noted_micro_batch_size(scratch) or process_micro_batch_size(config))


def divisors(config: TrainConfig) -> list[int]:
    """Return the sizes that cut a step into equal micro-batches, up to the rows of one process; ascending."""
    rows_per_process = -(-config.global_batch_size // config.num_processes)  # rounded up
    return [rows for rows in range(1, rows_per_process + 1) if config.global_batch_size % rows == 0]


def process_micro_batch_size(config: TrainConfig) -> int:
    """Return the largest number of rows in a micro-batch of one process."""
    rows_per_process = -(-config.global_batch_size // config.num_processes)  # rounded up
    return min(micro_batch_size(config), rows_per_process)


def eval_batch_size(config: TrainConfig) -> int:
    """Return the number of rows in a forward pass that only measures the loss."""
    # Twice the rows of training, since no activations are kept for a backward pass.
    return 2 * min(micro_batch_size(config), config.global_batch_size)
