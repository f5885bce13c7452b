"""How far a model's next tokens are from the live model's: KL divergence and greedy agreement.

Both models read the same batches, so both are in memory. Logits are computed at supervised tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import stats
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.lm import chat, forward


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models on one row.

    Attributes:
        id: The row's id.
        tokens: How many supervised tokens it has.
        kl_nats: KL(live || other) of the next-token distribution, summed over them.
        agreed: Before how many of them both find the same token likeliest.
    """

    id: str
    tokens: int
    kl_nats: float
    agreed: int


def compare(
    live: PreTrainedModel,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_tokens: int,
    what: str,
) -> list[Agreement]:
    """Compare the two at every supervised token, in the order of the rows.

    Args:
        live: In evaluation mode: what the other is held against.
        other: In evaluation mode, with the same vocabulary.
        tokenizer: Of both.
        rows: Chats.
        batch_tokens: Tokens of a forward pass, padding included. Half of it is used, since two models' logits are held.
        what: The work's name for the progress line.
    """
    encoded = [chat.encode(tokenizer, row.messages) for row in rows]
    found: dict[int, Agreement] = {}
    for batch in forward.batches([len(item.input_ids) for item in encoded], batch_tokens // 2):
        # Padding stands on the right, where a causal model's judged tokens cannot see it: no mask is needed.
        ids = torch.zeros(len(batch), len(encoded[batch[0]].input_ids), dtype=torch.long)
        for line, i in enumerate(batch):
            ids[line, : len(encoded[i].input_ids)] = torch.tensor(encoded[i].input_ids)
        # The logits that a token is chosen by stand one place before it; nothing stands before the first.
        at = [(n, k - 1) for n, i in enumerate(batch) for k, judged in enumerate(encoded[i].supervised) if judged and k]
        divergence, agreed = _at(live, other, ids, at) if at else (torch.zeros(0), torch.zeros(0))
        lines = torch.tensor([line for line, _ in at], dtype=torch.long)
        for line, i in enumerate(batch):
            mine = lines == line
            count, total = int(mine.sum()), float(divergence[mine].double().sum())
            found[i] = Agreement(rows[i].id, count, total, int(agreed[mine].sum()))
        progress.update(what, len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def kl(found: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    """The mean KL divergence in nats a token, with its interval over rows; None where it is not finite, or no token."""
    return _mean([row.kl_nats for row in found], found, settings)


def greedy(found: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    """The share of tokens on which both choose alike, with its interval over rows; None where there is no token."""
    return _mean([float(row.agreed) for row in found], found, settings)


def _mean(sums: Sequence[float], found: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    tokens = [row.tokens for row in found]
    if not sum(tokens) or not math.isfinite(sum(sums)):
        return None
    how: dict[str, Any] = {
        "confidence": settings.confidence,
        "samples": settings.bootstrap_samples,
        "seed": settings.seed,
    }
    return stats.difference_interval(sums, tokens, **how)  # a few rows make most of a KL


def _at(
    live: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor, at: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(live || other) and whether both choose alike, at each place."""
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.inference_mode():
        pair = [forward.logits_at(model, inputs, at) for model in (live, other)]
    divergence, agreed = [], []
    for ours, theirs in zip(*(logits.split(forward.LSE_ROWS) for logits in pair), strict=True):
        p, q = log_softmax(ours.float(), -1), log_softmax(theirs.float(), -1)
        # Rounding can bring two all but equal distributions a hair below 0.
        divergence.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0).cpu())
        agreed.append((ours.argmax(-1) == theirs.argmax(-1)).cpu())
    return torch.cat(divergence), torch.cat(agreed)
