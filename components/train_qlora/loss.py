"""Compute the loss of the supervised tokens, with logits only where the next token is supervised, chunk by chunk.

With a vocabulary of 49,152 and answers of a few tokens, full logits would be most of a step's work and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from components.train_qlora import packing
from components.train_qlora.data import IGNORE_INDEX, Batch, PaddingCollator, TokenizedDataset
from components.train_qlora.logits import after_head, logits_kind
from components.train_qlora.micro_batches import MicroBatch, prepare
from components.train_qlora.processes import distributed
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Cause, TryAgain

# Logits in memory at a time, in fp32. Larger chunks keep a GPU busy; a CPU needs no more than 512 x 49,152.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
# What a logit takes beside its gradient: one fp32 number, and where the model scales or caps it, what autograd keeps.
BYTES_PER_LOGIT = {"plain": 4, "transformed": 12}
# Of a chunk, the softmax takes so many at a time: a part that stays in a CPU's cache takes a third of the time.
BLOCK_BYTES = {"cpu": 2**20, "cuda": 256 * 2**20}


def supervised_mask(batch: Batch) -> Tensor:
    """Return (B, seq - 1) bool: the positions whose next token is supervised."""
    return batch["labels"][:, 1:] != IGNORE_INDEX


def summed_loss(model: Any, batch: Batch | MicroBatch) -> Tensor:
    """Return the cross entropy in nats, summed over the supervised tokens of a batch.

    The model's own forward method runs; a hook reduces the input of its output layer to the supervised positions.
    """
    micro_batch = prepare(model, batch)
    lm_head, kind = model.get_output_embeddings(), logits_kind(model)
    hidden_states: list[Tensor] = []

    # The output layer gets no position, and `ChunkedCrossEntropy` computes the logits. Where only the whole model can
    # compute them, it does so for the supervised positions.
    def select_supervised(_: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden_states.append(args[0].flatten(0, 1).index_select(0, micro_batch.label_positions))  # (supervised, D)
        return (hidden_states[0] if kind == "other" else hidden_states[0][:0],)

    hook = lm_head.register_forward_pre_hook(select_supervised)
    try:
        with packing.packed_attention(model):
            logits = model(**micro_batch.inputs, use_cache=False).logits
    finally:
        hook.remove()

    if kind == "other":
        return cross_entropy(logits.float(), micro_batch.labels, reduction="sum")
    transform = partial(after_head, model) if kind == "transformed" else None
    loss: Tensor = ChunkedCrossEntropy.apply(
        hidden_states[0], lm_head.weight, lm_head.bias, micro_batch.labels, transform
    )
    return loss


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum the cross entropy of an output layer; compute the gradients in forward, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Return a scalar from `hidden` (N, D), `weight` (V, D), `bias` (V,) and `labels` (N,).

        `transform` makes the logits (chunk, V) of the output layer's outputs (chunk, V); None: they are the logits.
        """
        total_loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if any(ctx.needs_input_grad[:3]) else None
        # Where the output layer trains, its gradient is a sum over the chunks, in fp32.
        grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and is_needed else None
            for tensor, is_needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )

        bytes_per_logit = BYTES_PER_LOGIT["transformed" if transform else "plain"]
        chunk_size = max(1, CHUNK_BYTES[hidden.device.type] // (bytes_per_logit * len(weight)))  # positions
        for start in range(0, len(labels), chunk_size):
            chunk = hidden[start : start + chunk_size]  # (chunk, D)
            targets = labels[start : start + chunk_size].unsqueeze(1)  # (chunk, 1)
            outputs = transformed = torch.nn.functional.linear(chunk, weight, bias)  # (chunk, V)
            if transform:
                with torch.set_grad_enabled(grad_hidden is not None):
                    transformed = transform(outputs.requires_grad_(grad_hidden is not None))
            # A copy, where autograd keeps the transformed logits for their gradient.
            logits = transformed.detach().clone() if transform else outputs

            total_loss += cross_entropy_in_place(logits, targets, needs_grad=grad_hidden is not None).sum()
            if grad_hidden is not None:
                if transform:
                    (logits,) = torch.autograd.grad(transformed, outputs, logits)
                grad_hidden[start : start + chunk_size] = logits @ weight
                if grad_weight is not None:
                    grad_weight += logits.T @ chunk  # (V, D)
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=torch.float32)
            del outputs, transformed, logits  # before the next chunk is allocated
        ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias, ctx.dtype = grad_hidden, grad_weight, grad_bias, weight.dtype
        return total_loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that forward computed, scaled by `grad_output`."""
        grad_hidden = ctx.grad_hidden * grad_output.to(ctx.grad_hidden.dtype)
        grad_weight, grad_bias = (
            None if grad is None else grad.mul_(grad_output).to(ctx.dtype) for grad in (ctx.grad_weight, ctx.grad_bias)
        )
        ctx.grad_weight = None  # it would stay as long as the loss, and the whole backward pass comes now
        return grad_hidden, grad_weight, grad_bias, None, None


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
        batch = collate([dataset[i] for i in indices])
        total_loss += summed_loss(model, batch).item()
        num_tokens += int(supervised_mask(batch).sum())

        num_done = min(round_start + batch_size * distributed.world_size(), len(order))
        progress.update("eval loss", num_done, len(order), eval_loss=total_loss / max(num_tokens, 1))
    all_loss, all_tokens = distributed.all_reduce_sum(total_loss, num_tokens)
    return all_loss / all_tokens
