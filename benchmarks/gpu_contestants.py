"""The contestants of `gpu.py`: the step's loop, TRL and Unsloth over the same 4-bit model and the same rows."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4


def make_ours(
    options: argparse.Namespace,
    model_folder: Path,
    rows: list[Any],
    *,
    liger: bool = False,
    every_n: int = 0,
    backend: str = "varlen",
    shares_prefix: bool = True,
) -> Any:
    """Return the step's loop.

    Args:
        options: The job.
        model_folder: The 4-bit base.
        rows: The rows, in their order.
        liger: Whether liger-kernel computes norms and gates.
        every_n: Recompute every n-th layer; 0: none.
        backend: How attention is computed, on a GPU; `padded` stands for transformers' own, over padded rows.
        shares_prefix: Whether the tokens that all rows begin with are computed once.
    """
    import training_contestants
    from transformers import set_seed

    from components.train_qlora import adapter, attention, packing, varlen
    from qlora_retrain.config.sections import TrainConfig
    from qlora_retrain.lm import loading

    config = TrainConfig(
        rank=RANK, alpha=ALPHA, dropout=0.0, learning_rate=LEARNING_RATE, schedule="constant", warmup_ratio=0.0,
        optimizer=options.optimizer, micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * options.accumulation, max_steps=options.steps,
        device=options.device, precision="bfloat16", attention="sdpa" if options.device == "cuda" else "eager",
        kernels="liger" if liger else "torch", gradient_checkpointing=every_n or None, checkpoint_minutes=1e6,
    )  # fmt: skip
    base = loading.load_nf4(model_folder, device=options.device, attn_implementation=config.attention, dtype="bfloat16")
    if backend == "sdpa":
        varlen.is_available = lambda *_: False
    if backend == "padded":
        packing.can_pack = lambda _: False
    for name, each in attention.BACKENDS.items():
        attention.BACKENDS[name] = dataclasses.replace(each, shares_prefix=shares_prefix)
    set_seed(0)
    run = training_contestants.our_run(options, config, adapter.attach_new(base, config), rows)
    return training_contestants.OurTrainer(run)


def peer_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what TRL and Unsloth are told; the rows come in their order."""
    is_gpu = options.device == "cuda"
    return {
        "output_dir": str(options.work / "peer"), "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.accumulation, "max_steps": options.steps,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "optim": options.optimizer,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": not is_gpu,
        "bf16": is_gpu, "train_sampling_strategy": "sequential", "seed": 0, "max_length": None,
    }  # fmt: skip


def make_trl(options: argparse.Namespace, model_folder: Path, rows: list[Any], *, tuned: bool) -> Any:
    """Return TRL's trainer: with its defaults, or without checkpointing and with Liger's kernels."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    is_gpu = options.device == "cuda"
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype="auto", attn_implementation="sdpa", device_map={"": 0} if is_gpu else None
    )
    model.config.use_cache = False
    set_seed(0)
    tuning = {"gradient_checkpointing": False, "use_liger_kernel": is_gpu} if tuned else {}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**peer_arguments(options), **tuning),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def make_unsloth(options: argparse.Namespace, model_folder: Path, rows: list[Any], *, checkpointing: bool) -> Any:
    """Return Unsloth's trainer, as its notebooks set it up."""
    import unsloth  # isort: skip - before TRL and transformers, which it changes
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    max_length = max(len(row["input_ids"]) for row in rows)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(model_folder), max_seq_length=max_length, load_in_4bit=True, local_files_only=True
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", random_state=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**peer_arguments(options), "max_length": max_length}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


CONTESTANTS: dict[str, Any] = {
    # "ours" is what the step chooses: the flash kernels over packed rows, whose common prefix is computed once.
    "ours": make_ours,
    "ours (varlen, shared prefix)": make_ours,
    "ours (varlen)": functools.partial(make_ours, shares_prefix=False),
    "ours (rows with a bias)": functools.partial(make_ours, backend="sdpa"),
    "ours (padded)": functools.partial(make_ours, backend="padded"),
    "ours, liger": functools.partial(make_ours, liger=True),
    "ours, liger, checkpointing": functools.partial(make_ours, liger=True, every_n=1),
    "ours, checkpointing": functools.partial(make_ours, every_n=1),
    "trl": lambda *a: make_trl(*a, tuned=False),
    "trl, tuned": lambda *a: make_trl(*a, tuned=True),
    "unsloth": lambda *a: make_unsloth(*a, checkpointing=False),
    "unsloth, checkpointing": lambda *a: make_unsloth(*a, checkpointing=True),
}
