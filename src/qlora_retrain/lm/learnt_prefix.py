"""Prefix tuning: learnt keys and values stand before every row in each layer (Li and Liang, arXiv 2101.00190).

PEFT makes a new cache of them in every forward pass, in place of the one that it is given. Whoever has a cache of their
own begins it with them, and calls the model below PEFT's.
"""

from __future__ import annotations

from typing import Any


def is_learnt(model: Any) -> bool:
    """Return whether the model is PEFT's with a prefix, switched on or off."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def split(model: Any) -> tuple[Any, Any]:
    """Return the model that reads tokens, and the cache of one row that it begins with: empty without a prefix.

    The positions of a row's tokens go on after those of its prefix, as PEFT has them.
    """
    from transformers import DynamicCache

    if not is_learnt(model):
        return model, DynamicCache()
    is_on = not model._adapters_disabled
    return model.base_model, model.get_prompt(batch_size=1) if is_on else DynamicCache()
