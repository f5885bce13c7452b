"""Compute the loss of the supervised tokens, with logits only where the next token is supervised, chunk by chunk.

With a vocabulary of 49,152 and answers of a few tokens, full logits would be most of a step's work and memory.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from components.train_qlora import distributed, packing
from components.train_qlora.data import IGNORE_INDEX, Batch, PaddingCollator, TokenizedDataset
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Cause, TryAgain

# Logits in memory at a time, in fp32. Larger chunks keep a GPU busy; a CPU needs no more than 512 x 49,152.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
# Of these, the softmax takes so many at a time: a part that stays in a CPU's cache takes a third of the time.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 256 * 2**20}
PLAIN_LOGITS_CACHE = WeakKeyDictionary[torch.nn.Module, bool]()  # by output layer: the results of `has_plain_logits`


def supervised_mask(batch: Batch) -> Tensor:
    """Return (B, seq - 1) bool: the positions whose next token is supervised."""
    return batch["labels"][:, 1:] != IGNORE_INDEX


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Return the cross entropy in nats, summed over the supervised tokens of a batch.

    The model's own forward method runs; a hook reduces the input of its output layer to the supervised positions.
    """
    if packing.can_pack(model):
        packed = packing.pack(batch, model.dtype)
        labels, positions = packed.labels, slice(None)  # (1, T): what each position must predict
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "packed_batch": packed}
    else:
        labels, positions = batch["labels"][:, 1:], slice(None, -1)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    is_labelled = labels != IGNORE_INDEX
    lm_head, is_plain = model.get_output_embeddings(), has_plain_logits(model)
    hidden_states: list[Tensor] = []

    # Where logits are the plain output of the output layer, that layer gets no position, and `ChunkedCrossEntropy`
    # computes them. Otherwise the model computes the logits of the supervised positions, scaled or capped as it does.
    def select_supervised(_: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden_states.append(args[0][:, positions][is_labelled])  # (supervised, D)
        return (hidden_states[0][:0] if is_plain else hidden_states[0],)

    hook = lm_head.register_forward_pre_hook(select_supervised)
    try:
        with packing.packed_attention(model):
            logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()

    if is_plain:
        loss: Tensor = ChunkedCrossEntropy.apply(hidden_states[0], lm_head.weight, lm_head.bias, labels[is_labelled])
        return loss
    return cross_entropy(logits.float(), labels[is_labelled], reduction="sum")


def has_plain_logits(model: Any) -> bool:
    """Return whether a model's logits are the output of its output layer; some models scale or cap them afterwards.

    Config files have many names for that, so a forward pass over three tokens finds it out, once per output layer.
    """
    lm_head, lm_head_outputs = model.get_output_embeddings(), list[Tensor]()
    if lm_head not in PLAIN_LOGITS_CACHE:
        hook = lm_head.register_forward_hook(lambda _, args, output: lm_head_outputs.append(output))
        try:
            # The probe must not change the draws of dropout.
            with torch.no_grad(), torch.random.fork_rng():
                logits = model(input_ids=torch.tensor([[0, 1, 2]], device=model.device), use_cache=False).logits
        finally:
            hook.remove()
        PLAIN_LOGITS_CACHE[lm_head] = torch.equal(logits.float(), lm_head_outputs[0].float())
    return PLAIN_LOGITS_CACHE[lm_head]


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum the cross entropy of a frozen output layer; compute the gradient in forward, while the logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """Return a scalar from `hidden` (N, D), `weight` (V, D), `bias` (V,) and `labels` (N,)."""
        total_loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None

        chunk_size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(weight)))  # positions
        for start in range(0, len(labels), chunk_size):
            chunk = hidden[start : start + chunk_size]  # (chunk, D)
            targets = labels[start : start + chunk_size].unsqueeze(1)  # (chunk, 1)
            logits = torch.nn.functional.linear(chunk, weight, bias)  # (chunk, V)
            total_loss += cross_entropy_in_place(logits, targets, needs_grad=grad_hidden is not None).sum()
            if grad_hidden is not None:
                grad_hidden[start : start + chunk_size] = logits @ weight
            del logits  # before the next chunk is allocated
        ctx.grad_hidden = grad_hidden  # (N, D)
        return total_loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient that forward computed, scaled by `grad_output`."""
        return (ctx.grad_hidden * grad_output.to(ctx.grad_hidden.dtype), None, None, None)


def cross_entropy_in_place(logits: Tensor, targets: Tensor, *, needs_grad: bool) -> Tensor:
    """Return the cross entropy of each position, (N, 1) in fp32; overwrite the logits, by their gradient if needed.

    Args:
        logits: (N, V), in any precision; the arithmetic is in fp32.
        targets: (N, 1)
        needs_grad: Whether the logits become their gradient.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    block_size = max(1, BLOCK_BYTES[logits.device.type] // (4 * logits.shape[1]))  # positions
    for block, block_targets, block_losses in zip(
        *(x.split(block_size) for x in (logits, targets, losses)), strict=True
    ):
        block_fp32 = block.float()
        block_fp32.sub_(block_fp32.amax(1, keepdim=True))  # so that exp does not overflow
        target_logits = block_fp32.gather(1, block_targets)

        # In place: an allocation of this size takes longer than the arithmetic.
        exp_logits = block_fp32.exp_()
        normalizer = exp_logits.sum(1, keepdim=True)
        torch.sub(normalizer.log(), target_logits, out=block_losses)

        # The gradient of the logits is softmax minus one-hot.
        if needs_grad:
            exp_logits.div_(normalizer)
            exp_logits.scatter_add_(1, block_targets, -torch.ones_like(block_targets, dtype=torch.float32))
            block.copy_(exp_logits)
    return losses


@torch.no_grad()  # type: ignore[untyped-decorator]
def mean_loss(model: Any, dataset: TokenizedDataset, pad_token_id: int, batch_size: int) -> float | None:
    """Return the mean loss per supervised token over all rows, which the processes share; None without rows.

    Raises:
        TryAgain: If the run is asked to stop; a checkpoint has the training so far.
    """
    if not len(dataset):
        return None
    model.eval()
    collate = PaddingCollator(pad_token_id)
    order = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])  # rows of similar length share a batch

    total_loss, num_tokens = 0.0, 0
    for round_start in range(0, len(order), batch_size * distributed.world_size()):
        if distributed.all_reduce_any(signals.stop_requested())[0]:
            raise TryAgain(
                "stopped during the evaluation; a checkpoint has the training so far, run the same command again",
                cause=Cause.PREEMPTED,
            )
        start = round_start + batch_size * distributed.rank()
        # With FSDP every process must run the same number of forward passes; one without a row gets `~index`, a row
        # without labels.
        indices = order[start : start + batch_size] or [~order[0]]
        batch = {k: v.to(model.device) for k, v in collate([dataset[i] for i in indices]).items()}
        total_loss += summed_loss(model, batch).item()
        num_tokens += int(supervised_mask(batch).sum())

        num_done = min(round_start + batch_size * distributed.world_size(), len(order))
        progress.update("eval loss", num_done, len(order), eval_loss=total_loss / max(num_tokens, 1))
    all_loss, all_tokens = distributed.all_reduce_sum(total_loss, num_tokens)
    return all_loss / all_tokens
