"""The section `merge`: which form of the adapter ships, in which files, and what that may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from qlora_retrain.config.fields import Device, Precision, Section, identity

Export = Literal[
    "bf16", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q4_1", "gguf-q4_0", "gguf-lora"
]


class MergeConfig(Section):
    """How the adapter becomes part of a 16-bit model, and in which forms that model ships."""

    base: Literal["auto", "measured", "original", "dequantized"] = identity(
        "auto",
        "measured: build both, choose on half the evaluation rows, certify on the other half; auto: that, or the "
        "dequantized base, certified on all rows, where a half would have fewer than min_prompts; with "
        "quantize.format: none both are the same, and one is built",
    )
    rank: Literal["full", "smallest"] | Annotated[int, Field(ge=1, le=1024)] = identity(
        "full",
        "full: the adapter as it was trained; smallest: of a half, a quarter, ... of its rank, the smallest that costs "
        "at most max_rank_loss_nats; a number: cut to this rank, which is not above train.rank",
    )
    max_rank_loss_nats: float = identity(
        0.01, "smallest: the loss per token that a smaller rank may cost on the rows that select", gt=0.0
    )
    strength: Literal["measured", "full"] | Annotated[float, Field(gt=0.0, le=1.0)] = identity(
        "measured",
        "what B A is multiplied by before it is merged; full: 1; measured: less where the model forgets more reference "
        "text than evaluate.max_forgetting_nats, and it has passages enough to choose on one half of them",
    )

    soup: int | None = identity(
        None,
        "one more form: the mean of this run's adapter and of the last soup - 1 accepted versions' over the same base, "
        "cut to this run's rank; it ships where it is better on the rows that select; null: none",
        ge=2,
        le=10,
    )

    # The limits, each against the unmerged model: the base in its format, with its adapter.
    min_prompts: int = identity(
        30, "measured: fewer different prompts than this in a half are insufficient evidence", ge=1
    )
    max_loss_increase_nats: float = identity(
        0.05, "refuse when base, rank and strength together cost more loss per token than this", gt=0.0
    )
    max_kl_nats: float | None = identity(
        None, "refuse when KL(unmerged || merged) per token may be above this; null: only reported", gt=0.0
    )
    min_agreement: float | None = identity(
        None,
        "refuse when both models may agree on the likeliest token less often than this; null: only reported",
        gt=0.0,
        le=1.0,
    )

    # What ships.
    max_shard_gib: float = identity(5.0, "largest size of a safetensors file", gt=0.0, le=64.0)
    exports: list[Export] = identity(
        ["bf16"], "forms that ship; bf16 must be among them, since the rules apply to it. Other forms are scored too"
    )
    ships_model: bool = identity(
        True, "set by the plan: whether a version holds the merged model, as publish.parts says"
    )
    max_export_loss_increase_nats: float | None = identity(
        0.1, "refuse when another export costs more loss per token than this; null: only reported", gt=0.0
    )
    device: Device = identity("auto", "as in train, for the scoring; the merge itself runs on the CPU")
    precision: Precision = identity("auto", "as in evaluate, for the scoring; the merge itself computes in float32")

    @field_validator("exports")
    @classmethod
    def _has_bf16(cls, value: list[Export]) -> list[Export]:
        if "bf16" not in value or len(set(value)) != len(value):
            raise ValueError(
                "name each form once, and bf16 too: the rules apply to it, and later versions are compared with it"
            )
        return value
