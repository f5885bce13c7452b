"""The scale of a LoRA adapter: what its product of B and A is multiplied by before it is added to a layer's output."""

from __future__ import annotations

import math

DEFAULT_SCALE = 2.0
# AdaLoRA's budget falls from this to the rank, as in the experiments of arXiv 2303.10512, section 4.
_ADALORA_SURPLUS = 1.5
FULL = "full"  # the method without an adapter
# Methods that no alpha scales, with what describes their adapter.
_WITHOUT_SCALE = {
    FULL: "none, since all weights train",
    "ia3": "scales of keys, values and the MLPs' inner numbers",
    "prompt": "virtual tokens before each row",
    "prefix": "keys and values of virtual tokens in each layer",
    "bottleneck": "a network behind each MLP",
}
NESTED_METHODS = ("dylora", "qdylora")  # the first ranks of an adapter are one, too, at alpha divided by their number


def initial_rank(rank: int, method: str) -> int:
    """Return the rank with which training begins."""
    return math.ceil(_ADALORA_SURPLUS * rank) if method == "adalora" else rank


def has_scale(method: str) -> bool:
    """Return whether alpha and rank say what the adapter is multiplied by."""
    return method not in _WITHOUT_SCALE


def default_alpha(rank: int, method: str) -> float:
    """Return the alpha that gives any rank the scale 2; with DyLoRA the scale 1, since fewer ranks have more."""
    return (1.0 if method in NESTED_METHODS else DEFAULT_SCALE) * _divisor(rank, method)


def adapter_scale(rank: int, alpha: float, method: str) -> float:
    """Return what B A is multiplied by."""
    return alpha / _divisor(rank, method)


def describe_adapter(rank: int, alpha: float | None, method: str) -> str:
    """Return rank, alpha and scale as a person compares them, e.g. `rank 16, alpha 32 (alpha/rank = 2)`."""
    if not has_scale(method) or alpha is None:
        return _WITHOUT_SCALE.get(method, _WITHOUT_SCALE[FULL]) + (f", {rank} wide" if method == "bottleneck" else "")
    formula = "alpha/sqrt(rank)" if method == "rslora" else "alpha/rank"
    return f"rank {rank}, alpha {alpha:g} ({formula} = {adapter_scale(rank, alpha, method):g})"


def _divisor(rank: int, method: str) -> float:
    # Rank-stabilized LoRA: arXiv 2312.03732.
    return math.sqrt(rank) if method == "rslora" else rank
