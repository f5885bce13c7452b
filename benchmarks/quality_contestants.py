"""Train the contestants of `quality.py` on the same rows, save them, and load them for scoring."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import training_contestants

RECIPE = {"schedule": "cosine", "warmup_ratio": 0.03}  # the step's defaults
BITS = {"qlora": 4, "lora": 16}


def make_trainer(options: argparse.Namespace, name: str, rows: list[Any], rate: float) -> Any:
    """Make a trainer over the rows, in their order, at this learning rate."""
    if name == "full":
        return make_full_trainer(options, rows, rate)
    return training_contestants.make_ours(options, rows, bits=BITS[name], learning_rate=rate, **RECIPE)


def make_full_trainer(options: argparse.Namespace, rows: list[Any], rate: float) -> Any:
    """Make the step's trainer with every weight trained: fp32 weights, moments and gradients, products in bf16.

    The published figures are of this form. `train.method: full` keeps bf16 weights and steps fp32 masters instead.
    """
    import torch
    from transformers import set_seed

    from components.train_qlora.micro_batches import prepare
    from qlora_retrain.lm import loading

    def summed_loss(model: Any, batch: Any) -> Any:
        micro_batch = prepare(model, batch, torch.bfloat16)
        # The weights are fp32, but products are computed in bf16 as in the step.
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.base_model(**micro_batch.inputs, use_cache=False).last_hidden_state[0]
            logits = model.get_output_embeddings()(hidden[micro_batch.label_positions])  # (supervised, vocabulary)
        return torch.nn.functional.cross_entropy(logits.float(), micro_batch.labels, reduction="sum")

    # Everything but the loss and the frozen weights is as in the step.
    config = training_contestants.our_config(options, learning_rate=rate, **RECIPE)
    set_seed(options.seed)
    model = loading.load_base(options.base, attn_implementation="eager", dtype="float32")
    run = training_contestants.our_run(options, config, model, rows)
    return training_contestants.OurTrainer(run, summed_loss, torch.bfloat16)


def save(model: Any, name: str, folder: Path) -> None:
    """Save the trained weights as they would ship: an adapter in fp32, or a whole model in bf16."""
    import torch

    from components.train_qlora import adapter

    if name == "full":
        model.to(torch.bfloat16).save_pretrained(folder)
    else:
        adapter.save(model, folder)


def load(options: argparse.Namespace, name: str, folder: Path) -> Any:
    """Load the contestant as `evaluate` would, in bf16."""
    from qlora_retrain.lm import loading

    if name in ("base", "full"):
        return loading.load_base(options.base if name == "base" else folder, dtype="bfloat16")
    if name == "base, 4 bits":
        return loading.load_nf4(options.work / "base_nf4", dtype="bfloat16")
    base = load(options, "base, 4 bits" if name == "qlora" else "base", folder)
    return loading.attach_adapter(base, folder)
