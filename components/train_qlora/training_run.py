"""Hold what a training process works on, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import set_seed

from components.train_qlora import adapter, all_weights, history, packing, warm_start
from components.train_qlora.batching import micro_batch_size
from components.train_qlora.data import (
    DistributedBatchSampler,
    LengthGroupedSampler,
    PaddingCollator,
    Rows,
    refuse_longer_rows,
)
from components.train_qlora.loss import supervised_mask
from components.train_qlora.methods import Full, Lora, method_of
from components.train_qlora.micro_batches import MicroBatch, prepare
from components.train_qlora.optimizer import AdapterOptimizer
from components.train_qlora.processes import distributed, fsdp
from components.train_qlora.warm_start import Matrices
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import Diverged, UsageError
from qlora_retrain.lm import adapter_start, checkpoints, loading
from qlora_retrain.lm.context_length import max_context_tokens

Item = TypeVar("Item")

ADAPTER_FOLDER = "adapter"  # in a checkpoint: a folder that PEFT can load as it is
BEST_FOLDER = "best"  # in a checkpoint: the same, with the weights of the lowest evaluation loss so far


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows that this process has in an optimizer step, ready for the model.

    Attributes:
        row_indices: The rows; one below 0 is a filler, without labels.
        tokens: The tokens of all processes together, without padding.
        supervised_tokens: Those of them that have a label.
        num_micro_batches: The fewest forward passes that fit in memory.
        micro_batches: Their rows. A GPU still computes the one before when the next one is laid out.
    """

    row_indices: list[int]
    tokens: int
    supervised_tokens: int
    num_micro_batches: int
    micro_batches: Iterator[MicroBatch]


class Lookahead(Iterator[Item]):
    """Iterate over items that take time to compute, and compute the next one earlier where asked to."""

    def __init__(self, items: Iterator[Item]) -> None:
        self.items = items
        self.ahead: list[Item] = []

    def look_ahead(self) -> None:
        """Compute the next item now, if there is one."""
        if not self.ahead:
            self.ahead += islice(self.items, 1)

    def __next__(self) -> Item:
        self.look_ahead()
        if not self.ahead:
            raise StopIteration
        return self.ahead.pop()


@dataclass
class TrainingRun:
    """A run of the recipe; one device per process, alone or with others.

    Attributes:
        config: The settings.
        model: The base with the adapter; the base itself where all its weights train.
        optimizer: The optimizer over what is trained.
        rows: The training rows, and the evaluation rows, of which there may be none.
        sampler: The order of the training rows.
        scratch: The folder of the checkpoints.
        report: Is called with the step and the numbers of every step and evaluation.
        step: How many optimizer steps are done.
        log: Every step and every evaluation so far; `history` reads it.
        best_weights: The adapter with the lowest evaluation loss so far; None before the first evaluation.
    """

    config: TrainConfig
    model: Any
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

    def remaining_steps(self) -> Lookahead[StepBatch]:
        """Iterate over the rows of this process in each remaining step; they depend on the seed and the epoch alone."""
        indices = islice(self._row_indices(), max(0, self.total_steps - self.step))
        return Lookahead(map(self._prepare_step, indices))

    def _row_indices(self) -> Iterator[list[int]]:
        """Yield the rows of this process in each step from the next one on, without end."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        while True:
            self.sampler.set_epoch(epoch)
            batches = DistributedBatchSampler(self.sampler, distributed.rank(), distributed.world_size())
            yield from islice(batches, position, None)
            epoch, position = epoch + 1, 0

    def _prepare_step(self, indices: list[int]) -> StepBatch:
        """Collate the rows, and cut them into as few micro-batches as fit."""
        batch = PaddingCollator(self.rows.pad_token_id)([self.rows.train[index] for index in indices])
        row_indices = batch.pop("row_indices")
        # A row index below 0 marks a filler row, whose tokens are not counted.
        own_counts = int(batch["attention_mask"][row_indices >= 0].sum()), int(supervised_mask(batch).sum())
        tokens, supervised_tokens = map(round, distributed.all_reduce_sum(*own_counts))

        own_count = packing.num_micro_batches(
            batch,
            micro_batch_size(self.config),
            is_packed=packing.can_pack(self.model),
            backend=packing.backend(self.model),
        )
        # With FSDP every rank must run the same number of micro-batches: each forward gathers shards from all ranks.
        parts = packing.split_batch(batch, max(distributed.all_gather(own_count)))
        # Only the first is laid out now. Each other is laid out after the one before it, whose layout is freed then.
        first, later = prepare(self.model, parts[0]), map(partial(prepare, self.model), parts[1:])
        return StepBatch(row_indices.tolist(), tokens, supervised_tokens, len(parts), chain([first], later))

    def begin_step(self) -> None:
        """Prepare the method, and draw what torch's DataLoader draws once an epoch, as a loop over one would."""
        if self.step % self.steps_per_epoch == 0:
            torch.empty((), dtype=torch.int64).random_()
        self.optimizer.method.begin_step(self.step, self.total_steps)

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
    config: TrainConfig,
    rows: Rows,
    base_nf4: Path,
    scratch: Path,
    report: Callable[[int, Mapping[str, Any]], None],
    champion_start: Mapping[str, Matrices] | None = None,
) -> TrainingRun:
    """Load the base, attach a new adapter, and return the run at its first step.

    Args:
        config: The settings.
        rows: The rows.
        base_nf4: The base.
        scratch: The folder of the checkpoints.
        report: Is called with the step and the numbers of every step and evaluation.
        champion_start: A and B by layer of the adapter from which training goes on; None: a new one.

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
    method = method_of(config)
    if isinstance(method, Full):
        all_weights.refuse_packed(base_nf4)
    refuse_longer_rows(rows, max_context_tokens(base.config.to_dict()), method.num_virtual_tokens)

    # The adapter must start the same in every process, but dropout must differ between them.
    set_seed(config.seed)
    needs_start = isinstance(method, Lora) and method.needs_start
    start = adapter_start.read(base_nf4) if needs_start else champion_start
    model = adapter.attach_new(base, config, method, start)
    if champion_start is not None:
        warm_start.refuse_other_layers(champion_start, adapter.layer_paths(model))
    if config.parallel == "fsdp":
        fsdp.shard(model, config.device)
    set_seed(config.seed + distributed.rank())

    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    sampler = LengthGroupedSampler(rows.train.lengths, config.global_batch_size, config.seed)
    run = TrainingRun(config, model, AdapterOptimizer(config, trainable, method), rows, sampler, scratch, report)
    if (config.warmup_steps or 0) >= run.total_steps:
        raise UsageError(
            f"train.warmup_steps: the learning rate would rise for {config.warmup_steps} steps, and the run has "
            f"{run.total_steps} in all; set fewer, or train.warmup_ratio"
        )
    return run
