"""The loss of the supervised tokens, with logits computed only where the next token is supervised.

With a vocabulary of 49,152 and answers of a few tokens, full logits would be most of a step's work and memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from components.train_qlora.rows import IGNORED, Batch, Collate, Rows
from qlora_retrain import preempt, progress
from qlora_retrain.errors import TryAgain


def supervised(batch: Batch) -> torch.Tensor:
    """(batch, seq - 1) bool: the positions whose next token is supervised."""
    return batch["labels"][:, 1:] != IGNORED


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross entropy in nats, summed over the supervised tokens of a batch.

    The model's own forward runs, whatever it does to its logits; only the input of its output layer is cut down.
    """
    wanted = supervised(batch)

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0][:, :-1][wanted].unsqueeze(0),)  # (1, supervised, hidden)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    return cross_entropy(output.logits[0].float(), batch["labels"][:, 1:][wanted], reduction="sum")


@torch.no_grad()  # type: ignore[untyped-decorator]
def mean_loss(model: Any, rows: Rows, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float | None:
    """Mean loss a supervised token over all rows; None where there are none.

    Raises:
        TryAgain: If asked to stop; the training before it is in a checkpoint.
    """
    if not len(rows):
        return None
    model.eval()
    collate = Collate(padding(tokenizer))
    order = sorted(range(len(rows)), key=lambda i: rows.lengths[i])
    total, tokens = 0.0, 0
    for start in range(0, len(order), batch_size):
        if preempt.requested():
            raise TryAgain("stopped while measuring the evaluation loss; the training is saved, run it again to go on")
        batch = {
            k: v.to(model.device) for k, v in collate([rows[i] for i in order[start : start + batch_size]]).items()
        }
        total += summed_loss(model, batch).item()
        tokens += int(supervised(batch).sum())
        progress.update("eval loss", min(start + batch_size, len(order)), len(order), eval_loss=total / tokens)
    return total / tokens


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; which one does not matter, the attention mask hides it."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(found, int)
    return found
