"""Run forward passes in batches of similar length under a token budget, with logits only at scored positions.

Logits are as wide as the vocabulary, so computing them at every position would take most of the memory of a forward
pass. With 262,144 words the logits of 4,096 positions are 4.3 GB, so they are computed in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain.lm.virtual_tokens import prefix_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Logits in memory at a time, in fp32. A larger chunk keeps a GPU busy; on a CPU it would only be a higher peak.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


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

    def after(self, prefix: list[int]) -> TargetSequence:
        """Return the sequence with these tokens in front, none of which is a target."""
        positions = [len(prefix) + position for position in self.logit_positions]
        return TargetSequence([*prefix, *self.input_ids], positions, self.target_ids)


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
    import torch

    index, token = torch.tensor(targets).unbind(1)
    values = torch.empty(len(targets))
    start = 0
    for logits in logit_chunks(model, inputs, positions):
        in_chunk = (index >= start) & (index < start + len(logits))
        values[in_chunk] = _select_logprobs(logits, index[in_chunk] - start, token[in_chunk]).cpu()
        start += len(logits)
    result: list[float] = values.tolist()
    return result


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

    if prefix := prefix_ids(model):
        sequences = [sequence.after(prefix) for sequence in sequences]
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
            values, hits = _score_targets(model, ids, positions, tokens)
            start = 0
            for i in batch:
                end = start + len(sequences[i].target_ids)
                # fsum rounds once, so the sum does not depend on the order of the tokens.
                scores[i] = SequenceScore(-math.fsum(values[start:end]), sum(hits[start:end]))
                start = end
        if on_progress:
            on_progress(len(batch))
    return scores


def _score_targets(
    model: PreTrainedModel, ids: torch.Tensor, positions: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> tuple[list[float], list[bool]]:
    """Return of each position the log-probability of its token, and whether no other token is likelier."""
    import torch

    values: list[float] = []
    hits: list[bool] = []
    with torch.inference_mode():
        for logits in logit_chunks(model, {"input_ids": ids, "use_cache": False}, positions):
            targets = torch.tensor(tokens[len(values) : len(values) + len(logits)])
            values += _select_logprobs(logits, torch.arange(len(logits)), targets).tolist()
            hits += (logits.argmax(-1) == targets.to(logits.device)).tolist()
    return values, hits


def logit_chunks(
    model: PreTrainedModel, inputs: dict[str, Any], positions: Sequence[tuple[int, int]]
) -> Iterator[torch.Tensor]:
    """Yield the logits at these (row, position) pairs, in their order, on the model's device: (chunk, vocab) each.

    The model's body runs once. What follows it runs once for every chunk: the output layer, and what some families do
    to logits afterwards. The output layer gets the hidden states of a chunk alone. This is a hook, and not a call of
    body and output layer, because of that which follows the output layer.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    row_index, position_index = torch.tensor(positions, device=device).unbind(1)
    output_layer = model.get_output_embeddings()
    chunk_size = max(1, CHUNK_BYTES[device.type] // (4 * len(output_layer.weight)))  # positions
    start = 0

    with _body_runs_once(model) as body_outputs:

        def select(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            # A body that transformers does not name has run unnoticed, and must not run again: no chunks then.
            chunk = slice(start, start + chunk_size if body_outputs else None)
            # (B, T, D) -> (1, chunk, D)
            return (args[0][row_index[chunk], position_index[chunk]].unsqueeze(0), *args[1:])

        handle = output_layer.register_forward_pre_hook(select)
        try:
            while start < len(positions):
                logits = model(**inputs).logits[0]
                start += len(logits)
                yield logits
                del logits  # or two chunks would be in memory
        finally:
            handle.remove()


def _select_logprobs(logits: torch.Tensor, index: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each target, (len(index),): of token[i] by the logits' row index[i]."""
    index, token = index.to(logits.device), token.to(logits.device)
    # log p(token) = logit - logsumexp(logits)
    return logits[index, token].float() - logits.float().logsumexp(-1)[index]


@contextmanager
def _body_runs_once(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Make all layers before the output layer answer with their first outputs, which the context's list then holds."""
    # An adapter wraps the causal model, of which transformers knows the body.
    causal_model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: Any = causal_model.get_decoder()
    body_forward, outputs = body.forward, list[Any]()

    def forward_once(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(body_forward(*args, **kwargs))
        return outputs[0]

    if body is causal_model:  # a family without a part of that name
        yield outputs
        return
    # The class has the method; only a library's hook puts another one on the module itself.
    previous = vars(body).get("forward")
    body.forward = forward_once
    try:
        yield outputs
    finally:
        if previous is None:
            del body.forward
        else:
            body.forward = previous
