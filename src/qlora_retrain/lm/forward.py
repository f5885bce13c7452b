"""Run forward passes in batches of similar length under a token budget, with logits only at scored positions.

Logits are as wide as the vocabulary, so computing them at every position would take most of the memory of a forward
pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FP32_ROWS = 256  # rows of logits that are widened to fp32 at a time: 50 MB with a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class TargetSequence:
    """A token sequence and the targets to score in it.

    Attributes:
        input_ids: The tokens that the model reads.
        logit_positions: The positions whose logits are needed.
        target_ids: The token to score at each of these positions: the one that follows it.
    """

    input_ids: list[int]
    logit_positions: list[int]
    target_ids: list[int]

    @classmethod
    def from_mask(cls, ids: list[int], is_target: Sequence[bool]) -> TargetSequence:
        """Make the targets of a token sequence the tokens that a mask selects.

        The first token follows nothing, so it is never a target. Tokens after the last target are not read.
        """
        positions = [i - 1 for i in range(1, len(ids)) if is_target[i]]
        return cls(ids[: positions[-1] + 1] if positions else ids[:1], positions, [ids[i + 1] for i in positions])


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """The summed loss of a sequence's targets, and how many of them are the model's own greedy choice."""

    loss_nats: float = 0.0
    hits: int = 0


def length_grouped_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of items of similar length; a batch has at most `batch_tokens` tokens with padding."""
    batch: list[int] = []

    # The longest first, so that a run that needs too much memory fails in its first batch and not in its last.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def target_logprobs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    positions: Sequence[tuple[int, int]],
    targets: Sequence[tuple[int, int]],
) -> list[float]:
    """Return the log-probabilities of targets, with logits at the given positions alone.

    Args:
        model: In evaluation mode.
        inputs: The arguments of the forward pass.
        positions: The (row, position) pairs of the inputs at which logits are computed.
        targets: The targets, as (index into `positions`, token).
    """
    values: list[float] = _select_logprobs(logits_at(model, inputs, positions), targets).tolist()
    return values


def score_sequences(
    model: PreTrainedModel,
    sequences: Sequence[TargetSequence],
    batch_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[SequenceScore]:
    """Score every sequence's targets, in the order of the sequences.

    Args:
        model: In evaluation mode.
        sequences: The sequences to score.
        batch_tokens: The tokens of a forward pass, padding included; a longer sequence forms a batch of its own.
        on_progress: Called after each batch with its number of sequences.
    """
    import torch

    scores = [SequenceScore()] * len(sequences)
    for batch in length_grouped_batches([len(sequence.input_ids) for sequence in sequences], batch_tokens):
        # Padding is on the right, where a causal model's targets cannot see it: no attention mask is needed.
        ids = torch.zeros(len(batch), len(sequences[batch[0]].input_ids), dtype=torch.long)  # (B, T)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i].input_ids)] = torch.tensor(sequences[i].input_ids)
        positions = [(row, position) for row, i in enumerate(batch) for position in sequences[i].logit_positions]
        tokens = [token for i in batch for token in sequences[i].target_ids]

        # A batch may have no target at all: a chat without an assistant turn, or a text of one token.
        if positions:
            with torch.inference_mode():
                logits = logits_at(model, {"input_ids": ids, "use_cache": False}, positions)  # (targets, vocab)
                values = iter(_select_logprobs(logits, list(enumerate(tokens))).tolist())
                hits = iter((logits.argmax(-1) == torch.tensor(tokens, device=logits.device)).tolist())
            for i in batch:
                count = len(sequences[i].target_ids)
                # fsum rounds once, so the sum does not depend on the order of the tokens.
                loss = -math.fsum(next(values) for _ in range(count))
                scores[i] = SequenceScore(loss, sum(next(hits) for _ in range(count)))
        if on_progress:
            on_progress(len(batch))
    return scores


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], positions: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the logits at these (row, position) pairs, (len(positions), vocab), on the model's device."""
    import torch

    device = model.get_input_embeddings().weight.device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    row_index, position_index = torch.tensor(positions, device=device).unbind(1)
    with _logits_only_at(model, row_index, position_index):
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def _select_logprobs(logits: torch.Tensor, targets: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the log-probability of each target, (len(targets),); a target is (row of the logits, token)."""
    import torch

    # log p(token) = logit - logsumexp(logits). In parts, since a full fp32 copy of the logits would double the memory.
    total = torch.cat([part.float().logsumexp(-1) for part in logits.split(FP32_ROWS)])
    index, token = torch.tensor(targets, device=logits.device).unbind(1)
    return logits[index, token].float() - total[index]


@contextmanager
def _logits_only_at(model: PreTrainedModel, row_index: torch.Tensor, position_index: torch.Tensor) -> Iterator[None]:
    """Give the output layer only the hidden states of these positions, as one row, inside the context.

    This is a hook, and not a call of backbone and output layer, because some families cap or scale logits afterwards.
    """

    def select(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # (B, T, D) -> (1, positions, D)
        return (args[0][row_index, position_index].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
