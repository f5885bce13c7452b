"""Find the likeliest of a closed set of labels by reading each of them after the whole prompt.

`label_ranking` is many times faster, but it reads the tokens of all labels side by side under a mask of its own. That
is exact only where attention follows mask and positions alone: not beyond a sliding window, and not in families that
measure distances by the place in the cache (ALiBi) or build their masks themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_retrain.lm import learnt_prefix
from qlora_retrain.lm.forward import TargetSequence, score_sequences
from qlora_retrain.lm.virtual_tokens import prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names that families give to the reach of a layer's attention.
_WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")


def max_tree_tokens(model: PreTrainedModel) -> float:
    """Return the longest prompt with a label that `label_ranking` ranks exactly; 0 where it never does."""
    # Families without it compute attention in code of their own.
    if not getattr(model, "_supports_attention_backend", False):
        return 0
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
        return math.inf
    windows = [getattr(config, name, None) for name in _WINDOW_NAMES]
    # A layer with a window keeps a part of a learnt prefix; a learnt prompt is before the row, in the window too.
    virtual_tokens = math.inf if learnt_prefix.is_learnt(model) else len(prefix_ids(model))
    return max(0, min((window - virtual_tokens for window in windows if isinstance(window, int)), default=math.inf))


def rank_labels(
    model: PreTrainedModel,
    label_ids: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    targets: Sequence[int | None],
    batch_tokens: int,
    on_progress: Callable[[int], None],
) -> list[tuple[int, float | None]]:
    """Find the likeliest label for every prompt, as `label_ranking.rank_labels` does.

    Args:
        model: In evaluation mode.
        label_ids: The tokens of each label, with its end.
        prompts: The tokens up to where the answer begins.
        targets: For each prompt the label whose log-likelihood is returned.
        batch_tokens: The tokens of a forward pass, padding included.
        on_progress: Called after each prompt with 1.
    """
    results: list[tuple[int, float | None]] = []
    for prompt, target in zip(prompts, targets, strict=True):
        sequences = [
            TargetSequence.from_mask([*prompt, *label], [False] * len(prompt) + [True] * len(label))
            for label in label_ids
        ]
        logprobs = [-score.loss_nats for score in score_sequences(model, sequences, batch_tokens)]
        # A broken model may score NaN, which is no winner.
        best = max(range(len(logprobs)), key=lambda i: -math.inf if math.isnan(logprobs[i]) else logprobs[i])
        results.append((best, None if target is None else logprobs[target]))
        on_progress(1)
    return results
