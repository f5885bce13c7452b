"""Batch sizes that follow from the line's settings.

They are computed here and not in the config models, because code identity hashes this folder but not the config
package. A formula that changed there would change the adapter under an unchanged key.
"""

from __future__ import annotations

from qlora_retrain.config.sections import TrainConfig


def process_micro_batch_size(config: TrainConfig) -> int:
    """Return the largest number of rows in a micro-batch of one process."""
    rows_per_process = -(-config.global_batch_size // config.num_processes)  # rounded up
    return min(config.micro_batch_size, rows_per_process)


def eval_batch_size(config: TrainConfig) -> int:
    """Return the number of rows in a forward pass that only measures the loss."""
    # Twice the rows of training, since no activations are kept for a backward pass.
    return 2 * min(config.micro_batch_size, config.global_batch_size)
