"""Build the contestants of `training.py`: trainers over the same rows that share only what a comparison needs."""

from __future__ import annotations

import argparse
import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock


class OurTrainer:
    """The step's loop over a run, with what the benchmarks use of a Trainer.

    Attributes:
        run: The run.
        model: Its model.
        summed_loss: The loss of a micro-batch: the step's own, or another one.
        dtype: The type of attention; None: that of the weights, as in the step.
    """

    def __init__(self, run: Any, summed_loss: Any = None, dtype: Any = None) -> None:
        from components.train_qlora import loss

        self.dtype = dtype
        self.run, self.model, self.summed_loss = run, run.model, summed_loss or loss.summed_loss
        # `training.py` wrote the rows in the sampler's order; sorting them again would change it.
        run.sampler = keep_order(run.sampler)

    def add_callback(self, callback: Any) -> None:
        """Call `on_step_end` after every step."""
        self.run.report = lambda *_: callback.on_step_end()

    def train(self) -> None:
        """Run every step."""
        from components.train_qlora import checkpoint, micro_batches, train, training_run
        from components.train_qlora.control import TrainingControl

        no_checkpoint = mock.patch.object(checkpoint, "save")  # the peers save none either
        prepare = functools.partial(micro_batches.prepare, dtype=self.dtype)
        in_dtype = mock.patch.object(training_run, "prepare", prepare)
        with no_checkpoint, in_dtype, mock.patch.object(train, "summed_loss", self.summed_loss):
            train.run_steps(self.run, TrainingControl(self.run))

    @property
    def state(self) -> Any:
        """What has the log, as in a Trainer."""
        return SimpleNamespace(log_history=self.run.log)


def our_run(options: argparse.Namespace, config: Any, model: Any, rows: list[Any]) -> Any:
    """Return a run of the step's loop that trains what the model leaves trainable."""
    from components.train_qlora.data import LengthGroupedSampler, Rows, TokenizedDataset
    from components.train_qlora.optimizer import AdapterOptimizer
    from components.train_qlora.training_run import TrainingRun

    dataset = TokenizedDataset(rows)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return TrainingRun(
        config,
        model,
        AdapterOptimizer(config, trainable),
        Rows(dataset, TokenizedDataset([]), pad_token_id=2),
        LengthGroupedSampler(dataset.lengths, config.global_batch_size, config.seed),
        options.work / "scratch",
        lambda *_: None,
    )


def make_ours(options: argparse.Namespace, rows: list[Any], *, bits: int = 4, **overrides: Any) -> Any:
    """Return the step's loop over the 4-bit or the 16-bit base; `overrides` change its config."""
    from transformers import set_seed

    from components.train_qlora import adapter
    from qlora_retrain.lm import loading

    # In bf16 with eager attention, like `trl, tuned`.
    config = our_config(options, **overrides)
    if bits == 4:
        base = loading.load_nf4(options.work / "base_nf4", attn_implementation="eager", dtype="bfloat16")
    else:
        base = loading.load_base(options.base, attn_implementation="eager", dtype="bfloat16")
    set_seed(options.seed)
    model = adapter.attach_new(base, config)
    set_seed(options.seed)
    return OurTrainer(our_run(options, config, model, rows))


def our_config(options: argparse.Namespace, **overrides: Any) -> Any:
    """Return the step's config for this work."""
    from qlora_retrain.config.sections import TrainConfig

    settings: dict[str, Any] = {
        "rank": options.rank, "alpha": 2 * options.rank, "dropout": options.dropout, "learning_rate": 2e-4,
        "schedule": "constant", "warmup_ratio": 0.0, "micro_batch_size": options.micro_batch_size,
        "global_batch_size": options.micro_batch_size * options.gradient_accumulation, "max_steps": options.steps,
        "device": "cpu", "precision": "bfloat16", "attention": "eager", "checkpoint_minutes": 1e6,
        "seed": options.seed,
    }  # fmt: skip
    return TrainConfig(**{**settings, **overrides})


def keep_order(sampler: Any) -> Any:
    """Return a sampler that leaves the rows in their order, which is the same for all contestants."""

    class FileOrderSampler(type(sampler)):
        def __iter__(self) -> Any:
            return iter(range(len(self.lengths)))

    return FileOrderSampler(sampler.lengths, sampler.global_batch_size, sampler.seed)


def peer_model(options: argparse.Namespace, attention: str) -> Any:
    """Return the 4-bit base as the peers load it."""
    from transformers import AutoModelForCausalLM, set_seed

    # `base_nf4` has a bitsandbytes config, so transformers loads it in 4 bits by itself.
    folder = options.work / "base_nf4"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    model.config.use_cache = False
    set_seed(options.seed)
    return model


def peer_settings(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return training arguments and LoRA config, with only the settings that a comparison needs."""
    from peft import LoraConfig

    # Sequential, since the rows are already in the sampler's order.
    arguments = {
        "output_dir": str(options.work / "peer"), "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation, "max_steps": options.steps, "learning_rate": 2e-4,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential", "seed": options.seed,
    }  # fmt: skip
    lora_config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return arguments, lora_config


def make_trl(options: argparse.Namespace, rows: list[Any], *, tuned: bool = False) -> Any:
    """Return TRL's SFTTrainer, with its defaults or `tuned` for short rows on a CPU."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments, lora_config = peer_settings(options)
    # TRL checkpoints activations by default, which trades speed for memory that these rows do not need.
    tuned_arguments = {"gradient_checkpointing": False} if tuned else {}
    return SFTTrainer(
        model=peer_model(options, "eager" if tuned else "sdpa"),
        args=SFTConfig(**arguments, **tuned_arguments, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.base),
        peft_config=lora_config,
    )


def make_trainer(options: argparse.Namespace, rows: list[Any]) -> Any:
    """Return the Trainer of transformers with PEFT, as its documentation sets it up."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments, lora_config = peer_settings(options)
    return Trainer(
        model=get_peft_model(peer_model(options, "sdpa"), lora_config),
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(options.base)),
    )


TRAINER_FACTORIES: dict[str, Any] = {
    "ours": make_ours,
    "ours, checkpointing": lambda options, rows: make_ours(options, rows, gradient_checkpointing=1),
    "ours, 16 bits": lambda options, rows: make_ours(options, rows, bits=16),
    "trainer": make_trainer,
    "trl": make_trl,
    "trl, tuned": lambda options, rows: make_trl(options, rows, tuned=True),
}
