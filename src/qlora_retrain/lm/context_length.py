"""Say how many tokens a model takes, from its config.json alone. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

# The names that families give to the number of positions.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model; a wrapper nests it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def max_context_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that the model is made for; None where config.json sets no limit.

    Scaled rotary embeddings lengthen it. Sliding windows do not shorten it, since later layers see further.
    """
    text_config = language_config(config)
    # A bias by distance (ALiBi) has no positions to run out of.
    if text_config.get("alibi"):
        return None
    limit = next((int(size) for name in _NAMES if _is_positive(size := text_config.get(name))), None)
    if limit is None:
        return None

    scaled = [
        _scaled_limit(rope, limit, text_config.get("original_max_position_embeddings"))
        for rope in _rope_parameters(text_config)
    ]
    return max(limit, *scaled) if scaled else limit


def _rope_parameters(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of every rotary embedding; transformers 5 may have one for each type of layer."""
    # Older files say `rope_scaling`.
    for rope in (config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(rope, Mapping):
            nested = [value for value in rope.values() if isinstance(value, Mapping)]
            yield from nested or [rope]


def _scaled_limit(rope: Mapping[str, Any], limit: int, original: Any) -> int:
    factor = rope.get("factor")
    if not _is_positive(factor):
        return limit
    # The limit may be that before or after scaling; the larger reading refuses nothing that works.
    lengths = (rope.get("original_max_position_embeddings"), original, limit)
    return int(next(length for length in lengths if _is_positive(length)) * factor)


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
