"""Compare a model's next-token distribution with the unmerged model's: KL divergence and greedy agreement.

Both models read the same batches, so both are in memory. Logits are computed only at supervised tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import bootstrap, row_tokens
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.lm import forward
from qlora_retrain.lm.chat import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models compared on one row.

    Attributes:
        id: The row's id.
        tokens: The number of its supervised tokens.
        kl_nats: KL(unmerged || other) of the next-token distribution, summed over these tokens.
        agreed_tokens: The number of them at which both models find the same token likeliest.
    """

    id: str
    tokens: int
    kl_nats: float
    agreed_tokens: int


def compare_models(
    unmerged: PreTrainedModel,
    merged: PreTrainedModel,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    batch_tokens: int,
    description: str,
) -> list[Agreement]:
    """Compare the two models at every supervised token, in the order of the rows.

    Args:
        unmerged: In evaluation mode; the model that the other is compared with.
        merged: In evaluation mode, with the same vocabulary.
        tokenizer: The tokenizer of both models.
        rows: Chats.
        batch_tokens: The tokens of a forward pass, padding included. Half of them are used, since the logits of two
            models are in memory.
        description: The name of the work in the progress line.
    """
    row_examples = row_tokens.examples(tokenizer, rows)
    encoded = [example for examples in row_examples for example in examples]
    owners = [i for i, examples in enumerate(row_examples) for _ in examples]
    # Of each example: tokens, KL and agreed tokens. A row is the sum over its examples.
    results: dict[int, tuple[int, float, int]] = {}
    for batch in forward.length_grouped_batches([len(item.input_ids) for item in encoded], batch_tokens // 2):
        # Padding is on the right, where a causal model's supervised tokens cannot see it: no attention mask is needed.
        ids = torch.zeros(len(batch), len(encoded[batch[0]].input_ids), dtype=torch.long)  # (B, T)
        for batch_row, i in enumerate(batch):
            ids[batch_row, : len(encoded[i].input_ids)] = torch.tensor(encoded[i].input_ids)

        # The logits that predict a token are one position before it; nothing predicts the first token.
        positions = [
            (n, k - 1)
            for n, i in enumerate(batch)
            for k, is_target in enumerate(encoded[i].supervised)
            if is_target and k
        ]
        kl, is_same = (
            _kl_and_agreement_at(unmerged, merged, ids, positions) if positions else (torch.zeros(0), torch.zeros(0))
        )

        # Sums in fp64: the KL of a row is thousands of tiny numbers.
        batch_rows = torch.tensor([batch_row for batch_row, _ in positions], dtype=torch.long)
        for batch_row, i in enumerate(batch):
            in_row = batch_rows == batch_row
            results[i] = int(in_row.sum()), float(kl[in_row].double().sum()), int(is_same[in_row].sum())
        progress.update(description, len(results), len(encoded))

    agreements = [Agreement(row.id, 0, 0.0, 0) for row in rows]
    for i, (tokens, kl_nats, agreed_tokens) in sorted(results.items()):
        row = agreements[owners[i]]
        agreements[owners[i]] = Agreement(
            row.id, row.tokens + tokens, row.kl_nats + kl_nats, row.agreed_tokens + agreed_tokens
        )
    return agreements


def mean_kl(agreements: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    """Return the mean KL divergence in nats per token, with its interval over rows.

    Returns:
        None where the KL is not finite, or where there is no token.
    """
    return _mean_interval([row.kl_nats for row in agreements], agreements, settings)


def greedy_agreement(agreements: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    """Return the fraction of tokens at which both models choose alike, with its interval over rows.

    Returns:
        None where there is no token.
    """
    return _mean_interval([float(row.agreed_tokens) for row in agreements], agreements, settings)


def _mean_interval(sums: Sequence[float], agreements: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    tokens = [row.tokens for row in agreements]
    if not sum(tokens) or not math.isfinite(sum(sums)):
        return None

    # A few rows make most of a KL divergence, so the interval must be right for skewed differences.
    return bootstrap.difference_interval(sums, tokens, BootstrapSettings.from_config(settings))


def _kl_and_agreement_at(
    unmerged: PreTrainedModel, merged: PreTrainedModel, ids: torch.Tensor, positions: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(unmerged || merged) and whether both choose the same token, each (len(positions),)."""
    # Right padding needs no mask, and a single pass needs no key-value cache.
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.inference_mode():
        pair = [forward.logits_at(model, inputs, positions) for model in (unmerged, merged)]

    # In parts (FP32_ROWS, vocab), since two fp32 copies of all logits would be the largest tensors of the step.
    kl, is_same = [], []
    for p_logits, q_logits in zip(*(logits.split(forward.FP32_ROWS) for logits in pair), strict=True):
        p, q = log_softmax(p_logits.float(), -1), log_softmax(q_logits.float(), -1)
        # Rounding can bring the KL of two nearly equal distributions slightly below 0.
        kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0).cpu())
        is_same.append((p_logits.argmax(-1) == q_logits.argmax(-1)).cpu())
    return torch.cat(kl), torch.cat(is_same)
