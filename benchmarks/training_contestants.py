"""The contestants of `training.py`: each a trainer over the same rows, with what must be equal and nothing else."""

from __future__ import annotations

import argparse
from typing import Any


def make_ours(options: argparse.Namespace, rows: list[Any], *, bits: int = 4, **recipe: Any) -> Any:
    """The trainer of the step, over the 4-bit or the 16-bit base; `recipe` changes its settings."""
    from transformers import set_seed

    from components.train_qlora import lora
    from components.train_qlora.rows import Rows
    from components.train_qlora.trainer import AdapterTrainer
    from qlora_retrain.lm import loading

    config = our_settings(options, **recipe)
    if bits == 4:
        base = loading.load_nf4(options.work / "base_nf4", attention="eager", dtype="bfloat16")
    else:
        base = loading.load_base(options.base, attention="eager", dtype="bfloat16")
    set_seed(options.seed)
    trainer = AdapterTrainer(lora.attach_new(base, config), config, Rows(rows), Rows([]), 2, options.work / "scratch")
    trainer.steps.order = as_given(trainer.order)
    trainer._save_checkpoint = lambda *_: None
    return trainer


def our_settings(options: argparse.Namespace, **recipe: Any) -> Any:
    """The step's settings for this work."""
    from qlora_retrain.config.sections import TrainConfig

    plain: dict[str, Any] = {
        "rank": options.rank, "alpha": 2 * options.rank, "dropout": options.dropout, "learning_rate": 2e-4,
        "schedule": "constant", "warmup": 0.0, "batch_size": options.batch,
        "gradient_accumulation": options.accumulation, "max_steps": options.steps, "device": "cpu",
        "precision": "bfloat16", "attention": "eager", "checkpoint_minutes": 1e6, "seed": options.seed,
    }  # fmt: skip
    return TrainConfig(**{**plain, **recipe})


def as_given(order: Any) -> Any:
    """An order that leaves the rows where they are: they were put in order for all contestants."""

    class AsGiven(type(order)):
        def __iter__(self) -> Any:
            return iter(range(len(self.lengths)))

    return AsGiven(order.lengths, order.rows_per_step, order.seed)


def peer_model(options: argparse.Namespace, attention: str) -> Any:
    """The 4-bit base as the peers load it."""
    from transformers import AutoModelForCausalLM, set_seed

    folder = options.work / "base_nf4"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    model.config.use_cache = False
    set_seed(options.seed)
    return model


def peer_settings(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """What must be equal for a comparison, and nothing else."""
    from peft import LoraConfig

    arguments = {
        "output_dir": str(options.work / "peer"), "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation, "max_steps": options.steps, "learning_rate": 2e-4,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential", "seed": options.seed,
    }  # fmt: skip
    adapter = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return arguments, adapter


def make_trl(options: argparse.Namespace, rows: list[Any], *, tuned: bool = False) -> Any:
    """TRL's SFTTrainer; `tuned` for short rows on a CPU."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments, adapter = peer_settings(options)
    best = {"gradient_checkpointing": False} if tuned else {}
    return SFTTrainer(
        model=peer_model(options, "eager" if tuned else "sdpa"),
        args=SFTConfig(**arguments, **best, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.base),
        peft_config=adapter,
    )


def make_trainer(options: argparse.Namespace, rows: list[Any]) -> Any:
    """The Trainer of transformers with PEFT, as its documentation has it."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments, adapter = peer_settings(options)
    return Trainer(
        model=get_peft_model(peer_model(options, "sdpa"), adapter),
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(options.base)),
    )


MAKERS: dict[str, Any] = {
    "ours": make_ours,
    "ours, lean": lambda options, rows: make_ours(options, rows, gradient_checkpointing=1),
    "ours, 16 bits": lambda options, rows: make_ours(options, rows, bits=16),
    "trainer": make_trainer,
    "trl": make_trl,
    "trl, tuned": lambda options, rows: make_trl(options, rows, tuned=True),
}
