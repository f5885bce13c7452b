"""Refuse settings of the section `train` that say nothing with its method, or that the method cannot have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_retrain.config.methods import METHODS

if TYPE_CHECKING:
    from qlora_retrain.config.sections import TrainConfig

# Methods that are no product of two matrices, so that nothing scales them and no layer is chosen.
WITHOUT_MATRICES = ("ia3", "prompt", "prefix", "bottleneck", "full")

# Methods whose layers all begin with one rank and one scale.
_WITH_ONE_RANK = (*WITHOUT_MATRICES, "adalora", "dylora", "qdylora", "lora-xs", "loftq", "lq-lora")
# Methods that look at all that trains as at matrices A and B.
_WITHOUT_WHOLE_MODULES = (*WITHOUT_MATRICES, "adalora")


# Knobs that only these values of train.method have.
_METHODS_OF_KNOB = {
    "learning_rate_ratio": ("lora+",),
    "dylora_update": ("dylora", "qdylora"),
    "loftq_iterations": ("loftq", "lq-lora"),
    "num_virtual_tokens": ("prompt", "prefix"),
}


def contradiction(train: TrainConfig) -> str | None:
    """Return what contradicts the method, and what to do; None where nothing does."""
    method = train.method
    for knob, methods in _METHODS_OF_KNOB.items():
        value = getattr(train, knob)
        if value is not None and method not in methods:
            return (
                f"{knob}: {value} is for method: {methods[0]}, and method is {method}; set method: {methods[0]}, or "
                "leave it out"
            )
    for knob in ("rank_pattern", "alpha_pattern"):
        if getattr(train, knob) and method in _WITH_ONE_RANK:
            return f"{knob}: with {method} all layers begin with one rank; leave {knob} out, or set method: lora"
    if train.modules_to_save and method in _WITHOUT_WHOLE_MODULES:
        return (
            f"modules_to_save: {', '.join(train.modules_to_save)} learn whole beside the matrices of an adapter, and "
            f"with method: {method} they cannot; leave it out, or set method: lora"
        )
    if train.modules_to_save and train.parallel == "fsdp":
        return (
            "modules_to_save: with parallel: fsdp each process has a part of the base, and these modules learn whole; "
            "set parallel: ddp, or leave it out"
        )
    if method not in WITHOUT_MATRICES:
        return None
    if train.parallel == "fsdp":
        base = "nothing is frozen" if method == "full" else "other tensors than these learn"
        return (
            f"parallel: fsdp shards a frozen base with matrices A and B, and with method: {method} {base}; set "
            "parallel: ddp, or method: lora"
        )
    if train.target_modules != "all-linear" or train.alpha is not None:
        reason = "trains all weights and has no adapter" if method == "full" else "has no matrices A and B"
        return (
            f"method: {method} {reason}, so target_modules and alpha say nothing; leave them out, or set method: lora"
        )
    if method == "prefix" and train.gradient_checkpointing:
        return (
            "gradient_checkpointing: with method: prefix a layer reads keys and values that are kept, and a recomputed "
            "layer keeps none; leave it out, or set method: prompt"
        )
    return None


def export_refusal(train: TrainConfig, exports: Sequence[str]) -> str | None:
    """Return why an adapter of these settings has no such exports; None where it has."""
    method = METHODS[train.method]
    if method.ships_alone and list(exports) != ["bf16"]:
        return (
            f"merge.exports: {', '.join(exports)} are forms of a merged model, and an adapter of train.method: "
            f"{train.method} cannot be merged, so it ships alone; leave exports out, or set train.method: lora"
        )
    if "gguf-lora" in exports and (method.llama_cpp != "yes" or train.modules_to_save):
        reason = "train.modules_to_save" if train.modules_to_save else f"train.method: {train.method}"
        return (
            f"merge.exports: gguf-lora holds two matrices for a layer, and with {reason} an adapter holds something "
            "else; leave gguf-lora out, or set train.method: lora without train.modules_to_save"
        )
    return None
