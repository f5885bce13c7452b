"""One section per step: every knob with its bounds, its default and its effect."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config import method_checks
from qlora_retrain.config.data import DataConfig as DataConfig
from qlora_retrain.config.evaluate import EvaluateConfig as EvaluateConfig
from qlora_retrain.config.fields import Device, Precision, Section, identity, operational
from qlora_retrain.config.merge import MergeConfig as MergeConfig
from qlora_retrain.config.methods import ADAPTER_RATE
from qlora_retrain.config.publish import PublishConfig as PublishConfig
from qlora_retrain.config.quantize import AdapterStart as AdapterStart
from qlora_retrain.config.quantize import QuantizeConfig as QuantizeConfig
from qlora_retrain.config.quantize import Targets

# As with `Targets`, a name alone is a pattern too.
LayerPattern = Annotated[str, Field(min_length=1, max_length=200)]


class TrainConfig(Section):
    """LoRA over the frozen base, or all of its weights."""

    # What is learnt.
    loss: Literal["answers", "all"] = identity(
        "answers", "answers: only the assistant's tokens are learnt; all: every token, as text without turns needs"
    )

    # The adapter.
    method: Literal[
        "lora",
        "rslora",
        "lora+",
        "dora",
        "adalora",
        "dylora",
        "qdylora",
        "qa-lora",
        "lora-xs",
        "loftq",
        "lq-lora",
        "ir-qlora",
        "ia3",
        "prompt",
        "prefix",
        "bottleneck",
        "full",
    ] = identity(
        "lora",
        "lora: alpha/rank times B A is added to each layer; rslora: alpha/sqrt(rank) times; lora+: as lora, and B "
        "learns at learning_rate_ratio times the rate of A; dora: direction and length of each row learn apart; "
        "adalora: the budget of rank moves between layers; dylora: each step trains another rank, so that every "
        "smaller one works too, and qdylora says that the base has 4 bits; qa-lora: A sees sums of 32 inputs, so that "
        "the trained model stays in quantize.format: int4; lora-xs: only rank x rank numbers learn between the base's "
        "largest singular vectors; loftq: the adapter starts from what quantization loses; "
        "lq-lora: as loftq, and the base's largest singular vectors go to the adapter first; ir-qlora: the adapter "
        "also passes on averages of its input; "
        "ia3: scales of keys, values and the MLP's inner numbers learn; prompt: the embeddings of "
        "num_virtual_tokens before each row learn; prefix: their keys and values in each layer; bottleneck: a "
        "network of rank numbers behind each MLP; the last three cannot be merged and ship as an adapter alone; "
        "full: no adapter, all weights learn, over quantize.format: none",
    )
    start: Literal["base", "champion"] = identity(
        "base",
        "base: a new adapter, which changes nothing yet; champion: the adapter of the version in production, so that "
        "training goes on from it (docs/training.md says when); lora, rslora and lora+ alone",
    )
    rank: int = identity(
        16,
        "higher: more capacity, memory and forgetting; with method: bottleneck the width of its network",
        ge=1,
        le=1024,
    )
    alpha: float | None = identity(
        None,
        "scales the adapter by alpha/rank; acts like a learning rate; null: 2 x rank (rslora: 2 x sqrt(rank)), so the "
        "scale is 2 for every rank (dylora: rank, so it is 1 for the whole and rank for a single one)",
        gt=0.0,
        le=4096,
    )
    dylora_update: Literal["all", "single"] | None = identity(
        None, "of dylora: what learns in a step of rank b; all: the first b ranks; single: the b-th alone; null: all"
    )
    loftq_iterations: int | None = identity(
        None,
        "how often loftq, and lq-lora at most, alternate between quantizing and the adapter's start; null: 5 and 10",
        ge=1,
        le=20,
    )
    num_virtual_tokens: int | None = identity(
        None, "of prompt and prefix: the tokens that learn; each makes every row longer; null: 20", ge=1, le=1024
    )
    dropout: float = identity(0.05, "dropout on the adapter's input; 0 trains faster", ge=0.0, lt=1.0)
    target_modules: Targets = identity(
        "all-linear",
        "all-linear: every linear layer; attention: q, k, v, o only: cheaper, weaker; mlp: all others; names, "
        "or a regular expression that matches the whole path of a layer, such as .*\\.[0-9]\\.self_attn\\..*",
    )
    rank_pattern: dict[LayerPattern, Annotated[int, Field(ge=1, le=1024)]] = identity(
        {}, "ranks of single layers, by a regular expression for the end of their paths, e.g. {down_proj: 32}"
    )
    alpha_pattern: dict[LayerPattern, Annotated[float, Field(gt=0.0, le=4096)]] = identity(
        {}, "alphas of single layers, as rank_pattern; a layer with another rank keeps alpha, unless it is here too"
    )

    modules_to_save: list[LayerPattern] = identity(
        [],
        "lm_head or embed_tokens, as the base names them: learn whole beside the adapter, at much memory",
        max_length=2,
    )

    # The optimizer.
    learning_rate: float = identity(
        ADAPTER_RATE,
        "5-10 times that of full fine-tuning; where it is not set, a plan takes what suits the method: 2e-5 for full, "
        "more for methods with few parameters",
        gt=0.0,
        le=1.0,
    )
    learning_rate_ratio: float | None = identity(
        None, "of lora+: the learning rate of B, divided by that of A, which is learning_rate; null: 16", ge=1.0, le=1e4
    )
    schedule: Literal["cosine", "linear", "constant"] = identity("cosine", "how the learning rate falls after warm-up")
    warmup_ratio: float | None = identity(
        None, "fraction of the steps in which the rate rises; null: 0.03, or warmup_steps", ge=0.0, lt=1.0
    )
    warmup_steps: int | None = identity(
        None, "number of steps in which the rate rises, in place of warmup_ratio; 0: none", ge=0
    )
    weight_decay: float = identity(0.0, "AdamW's decay on the adapter", ge=0.0, le=1.0)
    max_grad_norm: float = identity(1.0, "gradients are clipped to this norm; 0.3 helps against loss spikes", gt=0.0)
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit"] = identity(
        "paged_adamw_32bit", "8bit: a quarter of the optimizer state's memory, with a little noise"
    )

    # Batches, and the processes that share them.
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = identity(
        16,
        "a micro-batch has at most the tokens of this many padded rows; higher: faster, more memory; auto: the largest "
        "divisor of global_batch_size that fits into memory by the plan's estimate and a measured step",
    )
    global_batch_size: int = identity(
        16,
        "rows of an optimizer step, over all processes; higher: less noisy steps, but fewer per epoch",
        ge=1,
        le=1_048_576,
    )
    num_processes: int = identity(
        1, "processes that share the rows of an optimizer step; on cuda each has its own GPU", ge=1, le=64
    )
    parallel: Literal["ddp", "fsdp"] = identity(
        "ddp", "ddp: each process holds the whole base; fsdp: a shard of it, so less memory and more communication"
    )

    # How long.
    epochs: float = identity(3.0, "passes over the training rows; unused where max_steps is set", gt=0.0, le=1000)
    max_steps: int | None = identity(None, "number of optimizer steps; null: it follows from epochs", ge=1)
    seed: int = identity(0, "seeds the adapter's first weights, data order and dropout", ge=0, le=2**31 - 1)

    # How it computes.
    device: Device = identity("auto", "auto: cuda where the plan is made on a machine with an NVIDIA GPU, else cpu")
    precision: Precision = identity(
        "auto",
        "the type of the arithmetic; auto: bfloat16, or float32 on a CPU without bf16 arithmetic (8 times the memory)",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = identity(
        "auto", "auto: eager on a CPU (faster on short rows), sdpa on cuda"
    )
    kernels: Literal["auto", "torch", "liger"] = identity(
        "auto", "for norms and gates; auto: liger on cuda if it is installed where the plan is made, else torch"
    )
    gradient_checkpointing: Literal["offload"] | Annotated[int, Field(ge=1)] | None = identity(
        None,
        "recompute every n-th layer in the backward pass; 1 or true: all, a third slower, far less memory; null or "
        "false: none; offload: all, and their inputs wait in the host's memory (on a CPU as 1)",
    )

    # Evaluation during training.
    num_evals: int | None = identity(
        None,
        "how many times the evaluation loss is measured; the best adapter is kept. null: never, the last is kept",
        ge=1,
        le=1000,
    )
    early_stopping_patience: int | None = identity(
        None, "stop after this many evaluations in a row without a better loss; needs num_evals", ge=1
    )
    divergence_factor: float = identity(
        1.5, "an evaluation loss above the best one times this is a sign of divergence", gt=1.0
    )
    divergence_patience: int = identity(3, "this many such signs in a row end training with exit code 14", ge=1)

    # What changes no result.
    max_hours: float | None = operational(
        None,
        "hours of training over all attempts, then save and exit with 12; a larger budget continues; null: a week",
        gt=0.0,
        le=8760.0,
    )
    checkpoint_minutes: float = operational(
        5.0, "minutes between checkpoints: the most work that a crash loses", gt=0.0
    )
    log_every_steps: int = operational(10, "optimizer steps between printed losses", ge=1)
    report_to: list[Literal["mlflow", "wandb"]] = operational(
        [], "trackers that also get the losses, if installed; their own environment variables configure them"
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _all_or_none(cls, value: object) -> object:
        return {True: 1, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _processes_have_work_to_share(self) -> TrainConfig:
        if self.num_processes > self.global_batch_size:
            raise ValueError(
                f"num_processes: {self.num_processes} cannot share a step of {self.global_batch_size} rows; "
                "set fewer processes, or a larger global_batch_size"
            )
        if self.parallel == "fsdp" and self.num_processes == 1:
            raise ValueError("parallel: fsdp shares the base among processes, and num_processes is 1; set 2 or more")
        return self

    @model_validator(mode="after")
    def _settings_say_something(self) -> TrainConfig:
        if reason := method_checks.contradiction(self):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainConfig:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"warmup_ratio: {self.warmup_ratio:g} and warmup_steps: {self.warmup_steps} say the same thing twice; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _stopping_needs_measurements(self) -> TrainConfig:
        if self.early_stopping_patience is not None and self.num_evals is None:
            raise ValueError(
                "early_stopping_patience has no effect without evaluations; set num_evals too, or leave it out"
            )
        return self
