"""The scale of a LoRA adapter: what its product of B and A is multiplied by before it is added to a layer's output."""

from __future__ import annotations

import math

DEFAULT_SCALE = 2.0


def default_alpha(rank: int, method: str) -> float:
    """Return the alpha that gives an adapter of any rank the scale 2."""
    return DEFAULT_SCALE * _divisor(rank, method)


def adapter_scale(rank: int, alpha: float, method: str) -> float:
    """Return what B A is multiplied by."""
    return alpha / _divisor(rank, method)


def describe_adapter(rank: int, alpha: float, method: str) -> str:
    """Return rank, alpha and scale as a person compares them, e.g. `rank 16, alpha 32 (alpha/rank = 2)`."""
    formula = "alpha/sqrt(rank)" if method == "rslora" else "alpha/rank"
    return f"rank {rank}, alpha {alpha:g} ({formula} = {adapter_scale(rank, alpha, method):g})"


def _divisor(rank: int, method: str) -> float:
    # Rank-stabilized LoRA: arXiv 2312.03732.
    return math.sqrt(rank) if method == "rslora" else rank
