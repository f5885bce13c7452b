"""The scale of a LoRA adapter: what its product of B and A is multiplied by before it is added to a layer's output."""

from __future__ import annotations

import math

DEFAULT_SCALE = 2.0


def default_alpha(rank: int, *, rslora: bool) -> float:
    """Return the alpha that gives an adapter of any rank the scale 2."""
    return DEFAULT_SCALE * _divisor(rank, rslora=rslora)


def describe_adapter(rank: int, alpha: float, *, rslora: bool) -> str:
    """Return rank, alpha and scale as a person compares them, e.g. `rank 16, alpha 32 (alpha/rank = 2)`."""
    formula = "alpha/sqrt(rank)" if rslora else "alpha/rank"
    return f"rank {rank}, alpha {alpha:g} ({formula} = {alpha / _divisor(rank, rslora=rslora):g})"


def _divisor(rank: int, *, rslora: bool) -> float:
    # Rank-stabilized LoRA: arXiv 2312.03732.
    return math.sqrt(rank) if rslora else rank
