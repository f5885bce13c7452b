"""Hold what a training process works on, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from components.train_qlora import adapter, distributed, fsdp, history
from components.train_qlora.data import (
    Batch,
    DistributedBatchSampler,
    LengthGroupedSampler,
    PaddingCollator,
    Rows,
    refuse_longer_rows,
)
from components.train_qlora.optimizer import AdapterOptimizer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import Diverged, UsageError
from qlora_retrain.lm import checkpoints, loading
from qlora_retrain.lm.context_length import max_context_tokens

ADAPTER_FOLDER = "adapter"  # in a checkpoint: a folder that PEFT can load as it is
BEST_FOLDER = "best"  # in a checkpoint: the same, with the weights of the lowest evaluation loss so far


@dataclass
class TrainingRun:
    """A run of the recipe; one device per process, alone or with others.

    Attributes:
        config: The settings.
        model: The base with the adapter.
        optimizer: The optimizer over the adapter.
        rows: The training rows, and the evaluation rows, of which there may be none.
        sampler: The order of the training rows.
        scratch: The folder of the checkpoints.
        report: Is called with the step and the numbers of every step and evaluation.
        step: How many optimizer steps are done.
        log: Every step and every evaluation so far; `history` reads it.
        best_weights: The adapter with the lowest evaluation loss so far; None before the first evaluation.
    """

    config: TrainConfig
    model: PeftModel
    optimizer: AdapterOptimizer
    rows: Rows
    sampler: LengthGroupedSampler
    scratch: Path
    report: Callable[[int, Mapping[str, Any]], None]
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    best_weights: dict[str, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The optimizer steps in which every training row is read once; the last may have fewer rows."""
        return math.ceil(len(self.rows.train) / self.config.global_batch_size)

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the whole run."""
        return self.config.max_steps or math.ceil(self.config.epochs * self.steps_per_epoch)

    @property
    def eval_at_steps(self) -> set[int]:
        """The steps after which the run evaluates: evenly spaced, the last one after the last step."""
        num_evals = self.config.num_evals or 0
        return {max(1, round(self.total_steps * (i + 1) / num_evals)) for i in range(num_evals)}

    @property
    def has_stopped_improving(self) -> bool:
        """Whether the evaluation loss has not improved for as long as `early_stopping_patience` allows."""
        return history.has_stopped_improving(self.log, self.config.early_stopping_patience)

    @property
    def best_adapter_clause(self) -> str:
        """The part of a message that names the best adapter; empty where nothing was evaluated."""
        step = history.best_step(self.log)
        if step is None:
            return ""
        return f"; its {BEST_FOLDER}/ is the adapter of step {step}, with the lowest evaluation loss"

    def remaining_steps(self) -> Iterator[Batch]:
        """Yield the rows of this process in each remaining step; they depend on the seed and the epoch alone."""
        collate = PaddingCollator(self.rows.pad_token_id)
        while True:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            self.sampler.set_epoch(epoch)
            if position == 0:
                # torch's DataLoader draws once an epoch; so dropout draws what it would draw in a loop over one.
                torch.empty((), dtype=torch.int64).random_()
            batches = DistributedBatchSampler(self.sampler, distributed.rank(), distributed.world_size())
            for i, indices in enumerate(batches):
                if i >= position:
                    yield collate([self.rows.train[index] for index in indices])

    def add_to_log(self, numbers: Mapping[str, Any]) -> None:
        """Add the numbers of the step that is done, or of an evaluation after it, to the log, and report them."""
        epoch, position = divmod(self.step - 1, self.steps_per_epoch)
        entry = {**numbers, "epoch": epoch + (position + 1) / self.steps_per_epoch}
        self.log.append({**entry, "step": self.step})
        self.report(self.step, entry)

    def divergence(self, step: int, reason: str, row_indices: list[int] | None = None) -> Diverged:
        """Return the error that ends a run that no longer learns.

        Args:
            step: The step that shows it.
            reason: What it shows.
            row_indices: The rows of that step that this process had, where the message shall name the rows.
        """
        last_good = "there is no checkpoint yet"
        if folders := checkpoints.sorted_checkpoints(self.scratch):
            last_good = f"the last good checkpoint is {folders[-1].name}{self.best_adapter_clause}"
        rows = ""
        if row_indices is not None:
            indices = [row for part in distributed.all_gather(row_indices) for row in part if row >= 0]
            rows = f"; its rows are {', '.join(self.rows.train.row_ids[i] for i in indices)}"
        return Diverged(
            f"step {step} of {self.total_steps}: {reason}; {last_good}{rows}. "
            "Lower train.learning_rate or train.max_grad_norm, or check the training rows"
        )


def build_run(
    config: TrainConfig, rows: Rows, base_nf4: Path, scratch: Path, report: Callable[[int, Mapping[str, Any]], None]
) -> TrainingRun:
    """Load the base, attach a new adapter, and return the run at its first step.

    Raises:
        UsageError: If the settings or the rows do not fit the model.
    """
    # With several GPUs, each process takes the GPU of its rank.
    has_gpu_per_rank = config.device == "cuda" and distributed.world_size() > 1
    device = f"cuda:{distributed.rank()}" if has_gpu_per_rank else config.device
    base = loading.load_nf4(base_nf4, device=device, attn_implementation=config.attention, dtype=config.precision)
    if base.dtype == torch.float16:
        raise UsageError(
            "quantize.compute_dtype: float16 gradients underflow without loss scaling; train over bfloat16"
        )
    refuse_longer_rows(rows, max_context_tokens(base.config.to_dict()))

    # The adapter must start the same in every process, but dropout must differ between them.
    set_seed(config.seed)
    model = adapter.attach_new(base, config)
    if config.parallel == "fsdp":
        fsdp.shard(model, config.device)
    set_seed(config.seed + distributed.rank())

    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    sampler = LengthGroupedSampler(rows.train.lengths, config.global_batch_size, config.seed)
    run = TrainingRun(config, model, AdapterOptimizer(config, trainable), rows, sampler, scratch, report)
    if (config.warmup_steps or 0) >= run.total_steps:
        raise UsageError(
            f"train.warmup_steps: the learning rate would rise for {config.warmup_steps} steps, and the run has "
            f"{run.total_steps} in all; set fewer, or train.warmup_ratio"
        )
    return run
