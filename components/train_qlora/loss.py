"""The loss of the supervised tokens, with logits computed only where the next token is supervised, a part at a time.

With a vocabulary of 49,152 and answers of a few tokens, full logits would be most of a step's work and memory.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from components.train_qlora import packed, ranks
from components.train_qlora.rows import IGNORED, Batch, Collate, Rows
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import TryAgain

CHUNK = 512  # positions whose logits exist at a time: 100 MB for 49,152 words in fp32
PROBED = WeakKeyDictionary[torch.nn.Module, bool]()  # by output layer: see `logits_are_the_heads`


def supervised(batch: Batch) -> Tensor:
    """(batch, seq - 1) bool: the positions whose next token is supervised."""
    return batch["labels"][:, 1:] != IGNORED


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy in nats, summed over the supervised tokens of a batch.

    The model's own forward runs; only the input of its output layer is cut down to what is supervised.
    """
    if not packed.can_pack(model):
        labels, inputs = batch["labels"][:, 1:], {k: batch[k] for k in ("input_ids", "attention_mask")}
        return _loss(model, labels, inputs, cut=slice(None, -1))
    line = packed.pack(batch, model.dtype)
    with packed.attention_by_rows(model):
        return _loss(model, line.labels, {"input_ids": line.input_ids, "position_ids": line.position_ids, "line": line})


def _loss(model: Any, labels: Tensor, inputs: dict[str, Any], cut: slice = slice(None)) -> Tensor:
    """`labels` (rows, positions) say what is to be predicted at the positions that `cut` leaves."""
    wanted = labels != IGNORED
    head, plain = model.get_output_embeddings(), logits_are_the_heads(model, inputs)
    kept: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        kept.append(args[0][:, cut][wanted])  # (supervised, hidden)
        return (kept[0][:0] if plain else kept[0],)

    hook = head.register_forward_pre_hook(keep)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if plain:
        loss: Tensor = ChunkedCrossEntropy.apply(kept[0], head.weight, head.bias, labels[wanted])
        return loss
    return cross_entropy(logits.float(), labels[wanted], reduction="sum")


def logits_are_the_heads(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a model's logits are what its output layer gives: some models scale them, or cap them, under many names.

    Found out once for an output layer, by a forward pass over `inputs` with the logits of one position a row.
    """
    head, given = model.get_output_embeddings(), list[Tensor]()
    if head not in PROBED:
        hooks = (
            head.register_forward_pre_hook(lambda _, args: (args[0][:, :1],)),
            head.register_forward_hook(lambda _, args, out: given.append(out)),
        )
        try:
            with torch.no_grad(), torch.random.fork_rng():  # dropout is to draw what it would have drawn
                logits = model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        PROBED[head] = torch.equal(logits.float(), given[0].float())
    return PROBED[head]


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Summed cross entropy of a frozen output layer; its gradient is made with it, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """`hidden` (positions, hidden), `weight` (vocabulary, hidden), `labels` (positions,)."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), CHUNK):
            part, wanted = hidden[start : start + CHUNK], labels[start : start + CHUNK].unsqueeze(1)
            logits = torch.nn.functional.linear(part, weight, bias).float()  # (chunk, vocabulary)
            logits.sub_(logits.amax(1, keepdim=True))
            of_wanted = logits.gather(1, wanted)
            share = logits.exp_()  # all in the memory of the logits: to ask for more takes longer than to compute
            normal = share.sum(1, keepdim=True)
            total += (normal.log() - of_wanted).sum()
            if gradient is not None:
                share.div_(normal).scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=share.dtype))
                gradient[start : start + CHUNK] = share.to(weight.dtype) @ weight
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient that is there already, scaled."""
        return (ctx.gradient * upstream.to(ctx.gradient.dtype), None, None, None)


@torch.no_grad()  # type: ignore[untyped-decorator]
def mean_loss(model: Any, rows: Rows, pad: int, batch_size: int) -> float | None:
    """Mean loss a supervised token over all rows, which the processes share; None where there are none.

    Raises:
        TryAgain: If asked to stop; the training before it is in a checkpoint.
    """
    if not len(rows):
        return None
    model.eval()
    collate = Collate(pad)
    order = sorted(range(len(rows)), key=lambda i: rows.lengths[i])
    total, tokens = 0.0, 0
    for turn in range(0, len(order), batch_size * ranks.count()):
        if ranks.any_of(signals.requested())[0]:
            raise TryAgain("stopped while measuring the evaluation loss; the training is saved, run it again to go on")
        start = turn + batch_size * ranks.number()
        some = order[start : start + batch_size] or [~order[0]]  # every process makes the same number of passes
        batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in some]).items()}
        total += summed_loss(model, batch).item()
        tokens += int(supervised(batch).sum())
        done = min(turn + batch_size * ranks.count(), len(order))
        progress.update("eval loss", done, len(order), eval_loss=total / max(tokens, 1))
    loss, count = ranks.summed(total, tokens)
    return loss / count


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; which one does not matter, the attention mask hides it."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(found, int)
    return found
