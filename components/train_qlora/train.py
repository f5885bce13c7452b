"""Train the adapter and write it, in a single process or in each of several."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path

import torch
from transformers import set_seed

from components.train_qlora import adapter, distributed, fsdp, liger, tracker_keys, trackers
from components.train_qlora.batching import eval_batch_size
from components.train_qlora.data import TokenizedDataset, load_tokenized_dataset
from components.train_qlora.loss import mean_loss
from components.train_qlora.memory import as_memory_error
from components.train_qlora.report import TrainingResult, describe_optimizer
from components.train_qlora.trainer import AdapterTrainer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading
from qlora_retrain.lm.chat import load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.context_length import max_context_tokens


def train(config: TrainConfig, dataset: Path, base_nf4: Path, adapter_folder: Path, scratch: Path) -> TrainingResult:
    """Train from the newest checkpoint or from the start, write the adapter, and measure the evaluation loss.

    Raises:
        UsageError: If there is nothing to learn, or the settings do not fit the model.
        IntegrityError: If an input is unsafe or damaged.
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        TryAgain: If stopped before the end, after saving a checkpoint.
        MemoryError: If memory runs out, with the numbers.
    """
    tokenizer = load_tokenizer(base_nf4, ChatFormat.from_folder(dataset))
    train_dataset = load_tokenized_dataset(dataset / "train.jsonl", tokenizer, config.loss)
    eval_dataset = load_tokenized_dataset(dataset / "eval.jsonl", tokenizer, config.loss)
    if config.num_evals and not len(eval_dataset):
        raise UsageError(
            "train.num_evals: dataset/eval.jsonl has no rows to measure the loss on; leave the setting out"
        )
    if not len(train_dataset):
        raise UsageError("dataset/train.jsonl has no rows; there is nothing to train on")

    # The rows are read first, since the message of an out-of-memory error names the longest one.
    with as_memory_error(config, max(train_dataset.lengths)), trackers.report(config) as tracker_callback:
        pad_token_id = tokenizer.pad_token_id
        trainer = _build_trainer(config, train_dataset, eval_dataset, base_nf4, pad_token_id, scratch)
        trainer.add_callback(tracker_callback)
        with warnings.catch_warnings():
            # bitsandbytes has no paged memory on a CPU; the report says which optimizer ran.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            trainer.train_or_resume()

        model = trainer.model
        if distributed.is_main():
            adapter.save(model, adapter_folder)
        optimizer = describe_optimizer(config, trainer.optimizer)
        progress.say(f"optimizer: {optimizer}")
        eval_loss = mean_loss(model, eval_dataset, pad_token_id, eval_batch_size(config))

    control = trainer.training_control
    return TrainingResult(
        log=trainer.state.log_history,
        optimizer=optimizer,
        eval_loss=eval_loss,
        tokens_per_second=round(control.tokens_per_second, 1) if control.tokens else None,
        peak_rss_mib=round(distributed.all_reduce_sum(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)[0]),
        layers=adapter.trainable_by_layer(model),
        train_rows=len(train_dataset),
        eval_rows=len(eval_dataset),
    )


def _build_trainer(
    config: TrainConfig,
    train_dataset: TokenizedDataset,
    eval_dataset: TokenizedDataset,
    base_nf4: Path,
    pad_token_id: int,
    scratch: Path,
) -> AdapterTrainer:
    """Load the base, attach a fresh adapter and build the trainer over both."""
    # With several GPUs, each process takes the GPU of its rank.
    has_gpu_per_rank = config.device == "cuda" and distributed.world_size() > 1
    device = f"cuda:{distributed.rank()}" if has_gpu_per_rank else config.device
    base = loading.load_nf4(base_nf4, device=device, attn_implementation=config.attention, dtype=config.precision)
    if base.dtype == torch.float16:
        raise UsageError(
            "quantize.compute_dtype: float16 gradients underflow without loss scaling; train over bfloat16"
        )
    limit = max_context_tokens(base.config.to_dict())
    for file, dataset in (("train.jsonl", train_dataset), ("eval.jsonl", eval_dataset)):
        longest_row = max(dataset.lengths, default=0)
        if limit and longest_row > limit:
            raise UsageError(
                f"dataset/{file}: a row has {longest_row} tokens, but the model takes at most {limit}; lower "
                "data.max_length_tokens"
            )

    # The adapter must start the same in every process, but dropout must differ between them.
    set_seed(config.seed)
    model = adapter.attach_new(base, config)
    if config.parallel == "fsdp":
        fsdp.shard(model, config.device)
    trainer = AdapterTrainer(model, config, train_dataset, eval_dataset, pad_token_id, scratch)
    set_seed(config.seed + distributed.rank())
    return trainer


def check_environment(config: TrainConfig) -> None:
    """Check that the machine has what the settings need, before anything is read.

    Raises:
        UsageError: If a GPU or a package is missing.
    """
    if config.kernels == "liger" and not liger.IS_INSTALLED:
        raise UsageError("train.kernels: liger-kernel is not installed where the step runs; install it, or set `torch`")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device is cuda, but torch sees no GPU here; make the plan on a machine like the one that trains"
        )
    if config.device == "cuda" and torch.cuda.device_count() < config.num_processes:
        raise UsageError(
            f"train.num_processes: {config.num_processes} processes need one GPU each, but torch sees "
            f"{torch.cuda.device_count()} here; give the step more GPUs, or set fewer processes"
        )

    for tracker in config.report_to:
        tracker_keys.refuse_unready(tracker)
