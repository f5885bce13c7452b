"""Refuse parts of a version (`publish.parts`) that its method lacks, or that leave out what later runs need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_retrain.config.methods import METHODS

if TYPE_CHECKING:
    from qlora_retrain.config.sections import MergeConfig, PublishConfig, TrainConfig

# Their adapters also correct the packed base, which nobody can pack again from the original.
_CORRECTING_METHODS = ("loftq", "lq-lora")


def refusal(train: TrainConfig, merge: MergeConfig, publish: PublishConfig) -> str | None:
    """Return why versions of these settings cannot have these parts alone, and what to do; None where they can."""
    parts, method = ", ".join(publish.parts), train.method
    exports = [name for name in merge.exports if name != "bf16"]
    if exports and "exports" not in publish.parts:
        return (
            f"publish.parts: {parts} leaves out the exports, and merge.exports has {', '.join(exports)}; add exports "
            "to publish.parts, or set merge.exports: [bf16]"
        )
    if "model" not in publish.parts and method == "full":
        return f"publish.parts: {parts} leaves out the model, and train.method: full has nothing else; add model"
    if "model" not in publish.parts and method in _CORRECTING_METHODS:
        return (
            f"publish.parts: {parts} leaves out the model, and an adapter of train.method: {method} also corrects the "
            "packed base of its run, which nobody else has; add model, or set train.method: lora"
        )
    if "adapter" in publish.parts:
        return None
    if METHODS[method].ships_alone:
        return (
            f"publish.parts: {parts} leaves out the adapter, and an adapter of train.method: {method} cannot be merged "
            "into a model; add adapter"
        )
    if train.start != "base" or merge.soup is not None:
        knob = f"train.start: {train.start}" if train.start != "base" else f"merge.soup: {merge.soup}"
        return f"publish.parts: {parts} leaves out the adapter, which {knob} needs of earlier versions; add adapter"
    return None
