"""Train a LoRA adapter over the frozen 4-bit base, on the answers' tokens only.

Reads dataset (`train.jsonl`, `eval.jsonl`) and base_nf4 (a pre-quantized model with its tokenizer).
Makes adapter: PEFT's two files, `training.json`, `loss.jsonl` (a line a step) and `report.html`.
Keeps checkpoints in scratch and goes on from the newest one that verifies.
Refuses (12) data with nothing to learn and unknown layers; (13) unsafe or damaged inputs; ends with (14) when training
diverges and with (75) when it was stopped or its time budget is used up, after saving.

Command: `python -m components.train_qlora --plan URI`
"""

from __future__ import annotations

import json
import resource
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from components.train_qlora import events, history, lora
from components.train_qlora.loss import mean_loss, padding
from components.train_qlora.memory import shrinking
from components.train_qlora.result import optimizer_used, report_page
from components.train_qlora.rows import Rows, read
from components.train_qlora.trainer import AdapterTrainer
from qlora_retrain import modeling, progress
from qlora_retrain.chat import load_tokenizer
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.errors import UsageError
from qlora_retrain.outcome import Number, Report

LAST_STEPS = 10  # the training loss that is reported is their mean


def run(config: TrainConfig, dataset: Path, base_nf4: Path, adapter: Path, *, scratch: Path) -> Report:
    """Train, measure the evaluation loss, and write the adapter with its papers.

    Raises:
        UsageError: If there is nothing to learn, or the settings do not fit the model or the machine.
        IntegrityError: If an input is unsafe or damaged.
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        TryAgain: If stopped before the end, after saving a checkpoint.
        MemoryError: If memory runs out with a single row a pass.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device: cuda, but torch sees no GPU here; plan on the machine class that trains")
    for name in config.report_to:
        if find_spec(name) is None:
            raise UsageError(
                f"train.report_to: {name} is not installed where the step runs; install it or leave it out"
            )
    tokenizer = load_tokenizer(base_nf4)
    rows, held_out = read(dataset / "train.jsonl", tokenizer), read(dataset / "eval.jsonl", tokenizer)
    if config.evaluations and not len(held_out):
        raise UsageError("train.evaluations: dataset/eval.jsonl has no rows to measure; leave it out")
    if not len(rows):
        raise UsageError("dataset/train.jsonl: has no rows; there is nothing to train on")

    trainer, used, halvings = shrinking(
        config, max(rows.lengths), lambda now: _trained(now, rows, held_out, base_nf4, padding(tokenizer), scratch)
    )
    model = trainer.model
    lora.save(model, adapter)
    optimizer = optimizer_used(config, trainer.optimizer)
    progress.say(f"optimizer: {optimizer}")
    eval_loss = mean_loss(model, held_out, padding(tokenizer), 2 * used.batch_size)
    log = trainer.state.log_history
    steps, evaluations = history.steps(log), history.evaluations(log)
    last = [entry["loss"] for entry in steps[-LAST_STEPS:]]
    numbers: dict[str, Number] = {
        "steps": len(steps),
        "train_loss": sum(last) / len(last),
        "eval_loss": eval_loss,
        "best_step": history.best_step(log),
        "tokens": sum(entry["tokens"] for entry in steps),
        "supervised_tokens": sum(entry["supervised_tokens"] for entry in steps),
        "tokens_per_second": round(trainer.watch.tokens_per_second, 1) if trainer.watch.tokens else None,
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "trainable_parameters": lora.trainable_parameters(model),
        "rows_a_pass": used.batch_size,
        "out_of_memory": len(halvings),
        "optimizer": optimizer,
    }
    settings = config.model_dump(mode="json")
    document: dict[str, Any] = {"settings": settings, "train_rows": len(rows), "eval_rows": len(held_out), **numbers}
    document |= {"evaluation_losses": evaluations, "out_of_memory": halvings}
    (adapter / "training.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (adapter / "loss.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in steps), encoding="utf-8")
    events.write(adapter, history.curves(log))
    page = report_page(
        config, numbers, steps, evaluations, history.timings(log), lora.trainable_by_layer(model), halvings
    )
    (adapter / "report.html").write_text(page, encoding="utf-8")
    return Report(numbers)


def _trained(
    config: TrainConfig, rows: Rows, held_out: Rows, base_nf4: Path, pad: int, scratch: Path
) -> AdapterTrainer:
    """A trainer whose model has been trained, from the newest checkpoint if there is one."""
    base = modeling.load_nf4(base_nf4, device=config.device, attention=config.attention, dtype=config.precision)
    if base.dtype == torch.float16:
        raise UsageError("quantize.dtype: float16 gradients underflow without loss scaling; train over bfloat16")
    longest, limit = max(rows.lengths), getattr(base.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise UsageError(f"dataset/train.jsonl: a row has {longest} tokens and the model takes {limit}")
    set_seed(config.seed)
    trainer = AdapterTrainer(lora.attach_new(base, config), config, rows, held_out, pad, scratch)
    with warnings.catch_warnings():
        # bitsandbytes has no paged memory on a CPU; what was really used is found out and said.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        trainer.train_or_go_on()
    return trainer
