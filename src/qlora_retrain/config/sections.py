"""One section a step: every knob with its bound, its default and what turning it does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config.evaluate import EvaluateConfig as EvaluateConfig
from qlora_retrain.config.fields import Device, Precision, Section, identity, operational
from qlora_retrain.core import images
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import Image

Version = Annotated[str, Field(pattern=r"^\d{8}T\d{6}Z-[0-9a-f]{12}$")]
Export = Literal["bf16", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]
Alias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class DataConfig(Section):
    """How the raw files become chats, which rows are good enough, and which are kept for evaluation."""

    format: Literal["auto", "jsonl", "csv", "parquet"] = identity("auto", "auto: by each file's ending")
    messages_field: str = identity("messages", "field that holds the chat; unused where prompt_field is set")
    prompt_field: str | None = identity(None, "field that holds the user's text (one-turn data, e.g. a CSV)")
    response_field: str | None = identity(None, "field that holds the answer; needed with prompt_field")
    system: str | None = identity(None, "system turn for rows that have none; it is part of every prompt")
    task: Literal["text", "labels"] = identity("text", "labels: the answers are a closed set, scored by accuracy")
    language_field: str | None = identity(None, "field that names a row's language, for slices; null: by its script")
    reference: Version | None = identity(
        None, "a version whose data this must be like: refuse drift before training; null: `evaluate` alone judges it"
    )
    max_drift: float = identity(0.25, "with reference: refuse when the data surely drifted further (PSI)", gt=0.0)
    salt: str | None = identity(None, "seeds the split; null: the line's name. A new salt moves rows across it")
    eval_fraction: float = identity(0.1, "share of prompts kept for evaluation, by hash", gt=0.0, lt=1.0)
    max_eval_rows: int = identity(2000, "higher: narrower intervals, slower evaluation", ge=1, le=1_000_000)
    max_length_tokens: int = identity(1024, "longer rows are quarantined, never truncated", ge=16, le=131_072)
    min_train_rows: int = identity(100, "fewer good rows than this refuse the data", ge=1)
    min_eval_rows: int = identity(30, "fewer evaluation rows than this refuse the data", ge=1)
    max_quarantined: float = identity(0.05, "refuse when a larger share of the rows is bad", ge=0.0, le=1.0)
    max_duplicates: float = identity(0.2, "refuse when a larger share of the rows repeats another", ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _fields_go_together(self) -> DataConfig:
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field go together: set both, or neither for chats")
        return self


class QuantizeConfig(Section):
    """The 4-bit form of the base (QLoRA, arXiv 2305.14314, section 3)."""

    quant_type: Literal["nf4", "fp4"] = identity("nf4", "nf4 loses less than fp4 on normally distributed weights")
    double_quant: bool = identity(True, "quantize the scales too: 4.127 instead of 4.5 bits a weight")
    dtype: Literal["bfloat16", "float16"] = identity("bfloat16", "what weights are dequantized to while computing")


class TrainConfig(Section):
    """LoRA over the frozen 4-bit base."""

    rank: int = identity(16, "higher: more capacity, memory and forgetting; above 32 rarely helps", ge=1, le=1024)
    alpha: float = identity(32.0, "scales the adapter by alpha/rank; acts on it as a learning rate", gt=0.0, le=4096)
    dropout: float = identity(0.05, "on the adapter's input; 0 trains faster", ge=0.0, lt=1.0)
    rslora: bool = identity(False, "scale by alpha/sqrt(rank) instead")
    target_modules: Literal["all-linear", "attention"] | list[str] = identity(
        "all-linear", "attention: q, k, v, o only: cheaper, weaker"
    )
    learning_rate: float = identity(2e-4, "5-10 times that of full fine-tuning", gt=0.0, le=1.0)
    schedule: Literal["cosine", "linear", "constant"] = identity("cosine", "how the learning rate falls")
    warmup: float = identity(0.03, "share of the steps over which it first rises", ge=0.0, lt=1.0)
    weight_decay: float = identity(0.0, "AdamW's decay on the adapter", ge=0.0, le=1.0)
    max_grad_norm: float = identity(1.0, "clip above; 0.3 against spikes", gt=0.0)
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit"] = identity(
        "paged_adamw_32bit", "8bit: a quarter of the state's memory, a little noise"
    )
    batch_size: int = identity(
        16,
        "a forward pass has no more tokens than so many padded examples; higher: faster until memory ends",
        ge=1,
        le=4096,
    )
    gradient_accumulation: int = identity(
        1, "times batch_size: the examples of an optimizer step, however many processes share it", ge=1, le=4096
    )
    processes: int = identity(
        1, "processes that share the examples of a step, each with a GPU of its own on cuda; faster", ge=1, le=64
    )
    parallel: Literal["ddp", "fsdp"] = identity(
        "ddp", "ddp: each process holds the whole base; fsdp: a part, the rest fetched layer by layer: less memory"
    )
    epochs: float = identity(3.0, "passes over the training rows; unused where max_steps is set", gt=0.0, le=1000)
    max_steps: int | None = identity(None, "exactly this many optimizer steps", ge=1)
    seed: int = identity(0, "of the adapter's start, the data order and dropout", ge=0, le=2**31 - 1)
    device: Device = identity("auto", "auto: cuda where the plan is made beside an NVIDIA GPU")
    precision: Precision = identity(
        "auto", "what is computed in; auto: bfloat16, float32 on a CPU without bf16 arithmetic (8 times the memory)"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = identity(
        "auto", "auto: eager on a CPU (faster on short rows), sdpa on cuda"
    )
    kernels: Literal["auto", "torch", "liger"] = identity(
        "auto", "of norms and gates; auto: liger on cuda where the plan is made beside liger-kernel, else torch"
    )
    gradient_checkpointing: int | None = identity(
        None, "compute every n-th layer twice instead of keeping it; 1: a third slower, far less memory", ge=1
    )
    evaluations: int | None = identity(
        None, "times the evaluation loss is measured; the best adapter is kept. null: the last one", ge=1, le=1000
    )
    early_stopping: int | None = identity(
        None, "end when so many measurements in a row are no better than the best; needs evaluations", ge=1
    )
    worse_factor: float = identity(1.5, "an evaluation loss above this times the best one is a bad sign", gt=1.0)
    worse_times: int = identity(3, "so many bad signs in a row end the run (14)", ge=1)
    max_hours: float | None = operational(
        None, "of training in all tries: then save and exit 75; a larger budget goes on", gt=0.0
    )
    checkpoint_minutes: float = operational(5.0, "at most this much work is lost in a crash", gt=0.0)
    log_every_steps: int = operational(10, "how often the loss is printed", ge=1)
    report_to: list[Literal["mlflow", "wandb"]] = operational(
        [], "trackers that also get the losses, if installed; their own environment variables say where they are"
    )

    @property
    def rows_a_step(self) -> int:
        """Examples of an optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def rows_a_pass(self) -> int:
        """The most examples that are in a forward pass of a process."""
        return min(self.batch_size, -(-self.rows_a_step // self.processes))

    @model_validator(mode="after")
    def _processes_have_something_to_share(self) -> TrainConfig:
        if self.processes > self.rows_a_step:
            raise ValueError(
                f"processes: {self.processes} cannot share a step of {self.rows_a_step} examples "
                "(batch_size * gradient_accumulation); set fewer, or a larger step"
            )
        if self.parallel == "fsdp" and self.processes == 1:
            raise ValueError("parallel: fsdp shares the base among processes, and processes is 1; set 2 or more")
        return self

    @model_validator(mode="after")
    def _stopping_needs_measurements(self) -> TrainConfig:
        if self.early_stopping is not None and self.evaluations is None:
            raise ValueError("early_stopping needs evaluations: how often the evaluation loss is measured")
        return self


class MergeConfig(Section):
    """How the adapter becomes part of a 16-bit model, and in which forms that model ships."""

    base: Literal["measured", "original", "dequantized"] = identity(
        "measured", "measured: build both, choose on half the evaluation rows, certify on the other half"
    )
    min_rows: int = identity(30, "measured: fewer rows than this in a half are insufficient evidence", ge=1)
    max_loss_nats: float = identity(0.05, "refuse when merging costs more loss a token than this", gt=0.0)
    max_kl_nats: float | None = identity(
        None, "refuse when KL(live || merged) a token may be above this; null: reported alone", gt=0.0
    )
    min_agreement: float | None = identity(
        None, "refuse when the likeliest token may be the live model's less often than this; null: reported alone",
        gt=0.0, le=1.0,
    )  # fmt: skip
    max_shard_gib: float = identity(5.0, "size of a safetensors file at most", gt=0.0, le=64.0)
    exports: list[Export] = identity(
        ["bf16"], "forms that ship; bf16, the one that is judged, always does. Each further one is scored too"
    )
    max_export_loss_nats: float | None = identity(
        0.1, "refuse when another export costs more loss a token than this; null: reported alone", gt=0.0
    )
    device: Device = identity("auto", "as in train; for the scoring, the merge itself runs on the CPU")
    precision: Precision = identity("auto", "as in evaluate; for the scoring, the merge itself computes in float32")

    @field_validator("exports")
    @classmethod
    def _has_bf16(cls, value: list[Export]) -> list[Export]:
        if "bf16" not in value or len(set(value)) != len(value):
            raise ValueError("each form once, and bf16 among them: it is what is judged and compared later")
        return value


class PublishConfig(Section):
    """What consumers see."""

    promote_to: Alias | None = identity("production", "alias that moves to the new version; null: only `latest`")
    licence: str = identity("unspecified", "SPDX name of the model's licence, for the model card")
    description: str = identity("", "for the model card")


class Images(Section):
    """The images of the steps."""

    light_image: str = operational(images.DEFAULT["light"], "for steps without torch; a tag or digest, never latest")
    train_image: str = operational(images.DEFAULT["train"], "for steps with torch; a tag or digest, never latest")

    @field_validator("light_image", "train_image")
    @classmethod
    def _is_pinned(cls, value: str) -> str:
        try:
            return images.pinned(value)
        except UsageError as error:
            raise ValueError(str(error)) from None

    def image(self, kind: Image) -> str:
        """The image of a step."""
        return {"light": self.light_image, "train": self.train_image}[kind]


class RuntimeConfig(Images):
    """Where the steps of a DAG run; no step reads it, and nothing in it changes a result."""

    kind: Literal["local", "docker", "kubernetes"] = operational(
        "local",
        "local: subprocesses of the worker; docker: containers; kubernetes: pods, as the cluster's profile says",
    )
    memory_gib: float | None = operational(
        None, "a step that takes more is killed (137); null: no limit, kubernetes: the profile's", gt=0.0, le=4096
    )
    cpus: float | None = operational(
        None,
        "cores: docker: at most, kubernetes: asked for; null: no limit, kubernetes: the profile's",
        gt=0.0,
        le=1024,
    )
    disk_gib: float | None = operational(
        None, "kubernetes: a pod's disk, for output and checkpoints; null: the profile's work_gib", gt=0.0, le=65_536
    )
    pids: int = operational(1024, "docker: processes and threads a step may have", ge=16, le=65_536)
    network: str = operational("bridge", "docker: host where the store is on this machine's loopback")

    @model_validator(mode="after")
    def _the_profile_names_the_images(self) -> RuntimeConfig:
        if self.kind == "kubernetes" and (named := sorted(self.model_fields_set & set(Images.model_fields))):
            raise ValueError(f"{named[0]} has no effect with kind: kubernetes; the cluster's profile names the images")
        return self
