"""The contestants of `quality.py`: how each is trained on the same rows, kept, and loaded to be scored."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import training_contestants

RECIPE = {"schedule": "cosine", "warmup": 0.03}  # the step's defaults
BITS = {"qlora": 4, "lora": 16}


def make(options: argparse.Namespace, name: str, rows: list[Any], rate: float) -> Any:
    """A trainer over the rows, in the order given, at this learning rate."""
    if name == "full":
        return make_full(options, rows, rate)
    return training_contestants.make_ours(options, rows, bits=BITS[name], learning_rate=rate, **RECIPE)


def make_full(options: argparse.Namespace, rows: list[Any], rate: float) -> Any:
    """The step's trainer with every weight trained: fp32 weights, moments and gradients, products in bf16.

    bf16 weights would lose small updates to rounding. What differs from the step beside that is the loss alone: the
    step's own knows only frozen output layers.
    """
    import torch
    from transformers import set_seed

    from components.train_qlora import packed
    from components.train_qlora.rows import IGNORED, Rows
    from components.train_qlora.trainer import AdapterTrainer
    from qlora_retrain.lm import loading

    class FullTrainer(AdapterTrainer):
        def compute_loss(self, model: Any, inputs: Any, _: bool = False, num_items_in_batch: Any = None) -> Any:
            line = packed.pack(inputs, torch.bfloat16)
            wanted = line.labels != IGNORED
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.base_model(
                    input_ids=line.input_ids, position_ids=line.position_ids, line=line, use_cache=False
                ).last_hidden_state
                logits = model.get_output_embeddings()(hidden[wanted])  # (supervised, vocabulary)
            loss = torch.nn.functional.cross_entropy(logits.float(), line.labels[wanted], reduction="sum")
            return loss / num_items_in_batch

    config = training_contestants.our_settings(options, learning_rate=rate, **RECIPE)
    set_seed(options.seed)
    model = loading.load_base(options.base, attention="eager", dtype="float32")
    trainer = FullTrainer(model, config, Rows(rows), Rows([]), 2, options.work / "scratch")
    trainer.steps.order = training_contestants.as_given(trainer.order)
    trainer._save_checkpoint = lambda *_: None
    return trainer


def save(model: Any, name: str, folder: Path) -> None:
    """What was trained, as it would ship: an adapter in fp32, or a whole model in bf16."""
    import torch

    from components.train_qlora import lora

    if name == "full":
        model.to(torch.bfloat16).save_pretrained(folder)
    else:
        lora.save(model, folder)


def load(options: argparse.Namespace, name: str, folder: Path) -> Any:
    """The contestant as `evaluate` would load it, in bf16."""
    from qlora_retrain.lm import loading

    if name in ("base", "full"):
        return loading.load_base(options.base if name == "base" else folder, dtype="bfloat16")
    if name == "base, 4 bits":
        return loading.load_nf4(options.work / "base_nf4", dtype="bfloat16")
    over = load(options, "base, 4 bits" if name == "qlora" else "base", folder)
    return loading.attach(over, folder)
