"""Translate the line's settings into the arguments of transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import TrainingArguments

from qlora_retrain.config.sections import TrainConfig

LR_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def num_training_steps(config: TrainConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of the whole run."""
    return config.max_steps or math.ceil(config.epochs * math.ceil(num_rows / config.global_batch_size))


def training_arguments(config: TrainConfig, max_steps: int, scratch: Path) -> TrainingArguments:
    """Return the line's settings as the Trainer's arguments.

    A batch of the Trainer is a whole optimizer step; `AdapterTrainer.training_step` splits it into micro-batches.
    """
    return TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=config.global_batch_size,
        max_steps=max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=LR_SCHEDULERS[config.schedule],
        # transformers reads a number below 1 as a fraction of the steps.
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        seed=config.seed,
        use_cpu=config.device != "cuda",
        # The base computes in bf16 by itself; autocast would only add casts.
        bf16=False,
        logging_strategy="steps",
        logging_steps=1,
        # The filter would hide a NaN behind a running mean.
        logging_nan_inf_filter=False,
        # `TrainingControl` decides when to save, by time, and when to evaluate.
        save_strategy="no",
        eval_strategy="no",
        # `trackers` sends the losses, from a process that training does not wait for.
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # Every micro-batch reaches every adapter, so DDP need not search for unused ones.
        ddp_find_unused_parameters=False,
    )
