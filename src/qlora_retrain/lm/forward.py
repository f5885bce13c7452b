"""Passes through a model, in batches of like length under a token budget, with logits only where a token is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LSE_ROWS = 256  # logits widened to fp32 at a time: 50 MB with a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class Item:
    """A sequence of a batch; `at` is where logits are needed, `targets` are the tokens judged there."""

    ids: list[int]
    at: list[int]
    targets: list[int]

    @classmethod
    def of(cls, ids: list[int], judged: Sequence[bool]) -> Item:
        """A plain sequence; the token at 0 follows nothing, so it is never judged."""
        at = [i - 1 for i in range(1, len(ids)) if judged[i]]
        return cls(ids[: at[-1] + 1] if at else ids[:1], at, [ids[i + 1] for i in at])


@dataclass(frozen=True, slots=True)
class Judged:
    """An item's summed loss, and how many of its judged tokens the model would have chosen itself."""

    loss_nats: float = 0.0
    hits: int = 0


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of items of like length together, the longest first, so that memory ends at once or never."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def logprobs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    at: Sequence[tuple[int, int]],
    targets: Sequence[tuple[int, int]],
) -> list[float]:
    """The log-probabilities of targets, each (index into `at`, token), `at` being (row, position) of the inputs.

    Logits are computed at those positions alone.
    """
    values: list[float] = _logprobs(logits_at(model, inputs, at), targets).tolist()
    return values


def judge(
    model: PreTrainedModel,
    items: Sequence[Item],
    batch_tokens: int,
    tick: Callable[[int], None] | None = None,
) -> list[Judged]:
    """What the model makes of every item's targets.

    Args:
        model: In evaluation mode.
        items: The sequences.
        batch_tokens: Tokens of a forward pass, padding included; a longer item goes alone.
        tick: Told how many more items are done, after each batch.
    """
    import torch

    found = [Judged()] * len(items)
    for batch in batches([len(item.ids) for item in items], batch_tokens):
        # Padding stands on the right, where a causal model's judged tokens cannot see it: no mask is needed.
        ids = torch.zeros(len(batch), len(items[batch[0]].ids), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(items[i].ids)] = torch.tensor(items[i].ids)
        at = [(row, position) for row, i in enumerate(batch) for position in items[i].at]
        tokens = [token for i in batch for token in items[i].targets]
        if at:
            with torch.inference_mode():
                logits = logits_at(model, {"input_ids": ids, "use_cache": False}, at)
                values = iter(_logprobs(logits, list(enumerate(tokens))).tolist())
                hits = iter((logits.argmax(-1) == torch.tensor(tokens, device=logits.device)).tolist())
            for i in batch:
                count = len(items[i].targets)
                loss = -math.fsum(next(values) for _ in range(count))
                found[i] = Judged(loss, sum(next(hits) for _ in range(count)))
        if tick:
            tick(len(batch))
    return found


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], at: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The logits at these (row, position) of the inputs, and at no others: (len(at), vocab), on the model's device."""
    import torch

    device = model.get_input_embeddings().weight.device
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    rows, positions = torch.tensor(at, device=device).unbind(1)
    with _logits_only_at(model, rows, positions):
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def _logprobs(logits: torch.Tensor, targets: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(len(targets),), each target being (row of the logits, token)."""
    import torch

    total = torch.cat([part.float().logsumexp(-1) for part in logits.split(LSE_ROWS)])
    index, token = torch.tensor(targets, device=logits.device).unbind(1)
    return logits[index, token].float() - total[index]


@contextmanager
def _logits_only_at(model: PreTrainedModel, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """While open, the output layer sees these positions alone, as one row.

    A hook, and not a call of backbone and head, because what some families do to logits afterwards (a soft cap, a
    scale) must still be done.
    """

    def pick(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][rows, positions].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
