"""Train the adapter and write it: the whole of it in one process, or what each of several processes does."""

from __future__ import annotations

import resource
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import set_seed

from components.train_qlora import fused, lora, ranks, sharded
from components.train_qlora.loss import mean_loss, padding
from components.train_qlora.memory import noted
from components.train_qlora.result import Trained, optimizer_used
from components.train_qlora.rows import Rows, read
from components.train_qlora.trainer import AdapterTrainer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading
from qlora_retrain.lm.chat import load_tokenizer


def train(config: TrainConfig, dataset: Path, base_nf4: Path, adapter: Path, scratch: Path) -> Trained:
    """Train from the newest checkpoint or the start, write the adapter, measure the evaluation loss.

    Raises:
        UsageError: If there is nothing to learn, or the settings do not fit the model.
        IntegrityError: If an input is unsafe or damaged.
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        TryAgain: If stopped before the end, after saving a checkpoint.
        MemoryError: If memory runs out, with the numbers.
    """
    tokenizer = load_tokenizer(base_nf4)
    rows, held_out = read(dataset / "train.jsonl", tokenizer), read(dataset / "eval.jsonl", tokenizer)
    if config.evaluations and not len(held_out):
        raise UsageError("train.evaluations: dataset/eval.jsonl has no rows to measure; leave it out")
    if not len(rows):
        raise UsageError("dataset/train.jsonl: has no rows; there is nothing to train on")
    with noted(config, max(rows.lengths)):
        trainer = _trainer(config, rows, held_out, base_nf4, padding(tokenizer), scratch)
        with warnings.catch_warnings():
            # bitsandbytes has no paged memory on a CPU; what was really used is found out and said.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            trainer.train_or_go_on()
        model = trainer.model
        if ranks.first():
            lora.save(model, adapter)
        optimizer = optimizer_used(config, trainer.optimizer)
        progress.say(f"optimizer: {optimizer}")
        eval_loss = mean_loss(model, held_out, padding(tokenizer), 2 * config.batch_size)
    return Trained(
        log=trainer.state.log_history,
        optimizer=optimizer,
        eval_loss=eval_loss,
        tokens_per_second=round(trainer.watch.tokens_per_second, 1) if trainer.watch.tokens else None,
        peak_rss_mib=round(ranks.summed(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)[0]),
        layers=lora.trainable_by_layer(model),
        train_rows=len(rows),
        eval_rows=len(held_out),
    )


def _trainer(
    config: TrainConfig, rows: Rows, held_out: Rows, base_nf4: Path, pad: int, scratch: Path
) -> AdapterTrainer:
    """A trainer over the base with a fresh adapter."""
    several = config.device == "cuda" and ranks.count() > 1
    device = f"cuda:{ranks.number()}" if several else config.device
    base = loading.load_nf4(base_nf4, device=device, attention=config.attention, dtype=config.precision)
    if base.dtype == torch.float16:
        raise UsageError("quantize.dtype: float16 gradients underflow without loss scaling; train over bfloat16")
    longest, limit = max(rows.lengths), getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise UsageError(f"dataset/train.jsonl: a row has {longest} tokens and the model takes {limit}")
    set_seed(config.seed)
    model = lora.attach_new(base, config)
    if config.parallel == "fsdp":
        sharded.shard(model, config.device)
    trainer = AdapterTrainer(model, config, rows, held_out, pad, scratch)
    set_seed(config.seed + ranks.number())  # the adapter starts the same in every process, dropout does not
    return trainer


def refuse_what_is_not_here(config: TrainConfig) -> None:
    """Look whether the machine has what the settings want, before anything is read.

    Raises:
        UsageError: If it has not.
    """
    if config.kernels == "liger" and not fused.INSTALLED:
        raise UsageError("train.kernels: liger-kernel is not installed where the step runs; install it, or set torch")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device: cuda, but torch sees no GPU here; plan on the machine class that trains")
    if config.device == "cuda" and torch.cuda.device_count() < config.processes:
        raise UsageError(
            f"train.processes: {config.processes} processes take a GPU each, and torch sees "
            f"{torch.cuda.device_count()} here; give the step more of them, or set fewer processes"
        )
    for name in config.report_to:
        if find_spec(name) is None:
            raise UsageError(
                f"train.report_to: {name} is not installed where the step runs; install it or leave it out"
            )
