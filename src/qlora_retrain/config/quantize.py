"""The section `quantize`: in which form the frozen base is stored, and what an adapter starts from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_retrain.config.fields import Section, identity

# A layer's name alone is a pattern too; `all-liner` must be refused as the mistake that it is, and not match nothing.
Pattern = Annotated[str, Field(pattern=r"[.*+?\[\](){}|^$\\]", max_length=200)]
Targets = Literal["all-linear", "attention", "mlp"] | list[str] | Pattern


class AdapterStart(Section):
    """What an adapter starts from, where its method computes that of the original weights."""

    method: Literal["lora-xs", "loftq", "lq-lora"] = identity(..., "train.method")
    rank: int = identity(..., "train.rank", ge=1, le=1024)
    target_modules: Targets = identity(..., "train.target_modules")
    iterations: int = identity(..., "train.loftq_iterations", ge=1, le=20)


class QuantizeConfig(Section):
    """The form in which the frozen base is trained over (QLoRA, arXiv 2305.14314, section 3)."""

    format: Literal["none", "nf4", "fp4", "int4", "nf4-shifted", "mixed"] = identity(
        "nf4",
        "how linear layers are stored; nf4: 4 bits, with less loss than fp4 on normally distributed weights; fp4: 4 "
        "bits; int4: integers of 4 bits in groups of 32 weights, 5 bits with the groups' numbers, those of llama.cpp's "
        "Q4_1; nf4-shifted: nf4 after each block's best constant was subtracted, 4.25 bits; mixed: nf4 or 8 bits by "
        "layer, within bits_per_weight; none: all 16 bits, four times the memory, as plain LoRA has it",
    )
    double_quant: bool = identity(True, "of nf4 and fp4: quantize the scales too, 4.127 instead of 4.5 bits per weight")
    bits_per_weight: float | None = identity(
        None,
        "of mixed: the bits that a weight of a linear layer has on average at most; layers that lose most in 4 bits "
        "get 8; null: 5",
        ge=4.2,
        le=8.2,
    )
    compute_dtype: Literal["bfloat16", "float16"] = identity(
        "bfloat16", "the 16-bit type to which weights are dequantized for computing, and of all that is not packed"
    )
    min_quantized_fraction: float = identity(
        0.9,
        "refuse a base of which less than this, outside embeddings and head, is in linear layers: these alone become "
        "4-bit, and adapters reach no others",
        ge=0.0,
        le=1.0,
    )

    adapter_start: AdapterStart | None = identity(
        None, "set by the plan where the adapter of train.method starts from the original weights, as loftq's does"
    )

    @model_validator(mode="after")
    def _double_quant_needs_scales(self) -> QuantizeConfig:
        if self.format not in ("nf4", "fp4") and not self.double_quant:
            raise ValueError(
                "double_quant: false is for format: nf4 and fp4, whose scales can be quantized, and format is "
                f"{self.format}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_needs_a_choice(self) -> QuantizeConfig:
        if self.bits_per_weight is not None and self.format != "mixed":
            raise ValueError(
                f"bits_per_weight: {self.bits_per_weight:g} is for format: mixed, and format is {self.format}, which "
                "has the same bits in every layer; set format: mixed, or leave it out"
            )
        return self
