"""Count what an adapter without matrices A and B has, by arithmetic: for the planner, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_retrain.lm.model_shape import ModelShape

DEFAULT_VIRTUAL_TOKENS = 20
WITH_VIRTUAL_TOKENS = ("prompt", "prefix")


def num_virtual_tokens(train: Mapping[str, Any]) -> int:
    """Return the tokens that the values of the section `train` put before each row."""
    if train["method"] not in WITH_VIRTUAL_TOKENS:
        return 0
    return int(train.get("num_virtual_tokens") or DEFAULT_VIRTUAL_TOKENS)


def trained_tensors(shape: ModelShape, method: str, rank: int, virtual_tokens: int) -> list[int] | None:
    """Return the numbers in each tensor that trains; None for a method with matrices, or one that trains all weights.

    Args:
        shape: The model's.
        method: `train.method`.
        rank: The width of a bottleneck.
        virtual_tokens: The tokens before each row.
    """
    if method == "ia3":
        return [shape.kv_width, shape.kv_width, shape.mlp_width] * shape.layers
    if method == "prompt":
        return [virtual_tokens * shape.width]
    if method == "prefix":
        return [virtual_tokens * 2 * shape.kv_width * shape.layers]
    if method == "bottleneck":
        return [rank * shape.width] * 2 * shape.layers
    return None


def kept_bytes(shape: ModelShape, method: str, rank: int, bytes_per_number: int) -> int:
    """Return what a layer of such a method keeps of each token for the backward pass."""
    if method == "ia3":
        # PEFT computes in fp32: what is scaled, for the scales' gradients.
        return 4 * (2 * shape.kv_width + shape.mlp_width)
    if method == "bottleneck":
        return (shape.width + 2 * rank) * bytes_per_number
    return 0
