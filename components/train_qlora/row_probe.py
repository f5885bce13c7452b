"""Try on two short rows whether a model computes each row alone, and whether rows may be packed; before any training.

A model may read later tokens, take padding for text, or not pass on what packed attention needs. Names and settings do
not tell. So the logits of each row alone are compared with those of the padded and of the packed batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from components.train_qlora import packing
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from components.train_qlora.micro_batches import prepare
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError

PREFIX_LEN, ROW_LENS = 3, (9, 6)
# The distance of two sets of logits, relative to their spread. In most models rounding stays below the first numbers.
# Some amplify it: rounding the embeddings of Qwen2.5 1.5B once moves its logits in bf16 by 0.1 to 0.2. So that is
# measured, and three times as much is allowed. Wrong masks and positions are above the last number (0.67 to 1.4 there).
MAX_DISTANCE = {torch.float32: 1e-3}
MAX_DISTANCE_16_BITS = 0.1
MAX_DISTANCE_OF_ROUNDING = 0.5


@torch.no_grad()  # type: ignore[untyped-decorator]
def probe_rows(model: Any) -> None:
    """Refuse a model whose rows are not independent and causal; where packing changes its logits, turn packing off.

    Args:
        model: In evaluation mode, so that dropout is off.

    Raises:
        UsageError: If a row's logits depend on later tokens or on the other rows of its batch.
    """
    rows = _rows(model.get_input_embeddings().weight.shape[0])
    alone = [model(input_ids=_tensor(model, row), use_cache=False).logits[0] for row in rows]
    limit = _max_distance(model, rows[0], alone[0])
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    cut = model(input_ids=_tensor(model, rows[0][: ROW_LENS[1]]), use_cache=False).logits[0]
    if not _is_close(cut, alone[0][: ROW_LENS[1]], limit):
        raise UsageError(
            f"base_nf4: {name} lets a token see later ones, so it would see the answer that it should learn; choose a "
            "causal language model"
        )

    # The labels of the batch are its tokens, so packing leaves none out.
    examples = [{"input_ids": row, "labels": [IGNORE_INDEX] * PREFIX_LEN + row[PREFIX_LEN:]} for row in rows]
    batch = PaddingCollator(0)(examples)
    padded_inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    padded = model(**padded_inputs, use_cache=False).logits
    if not all(_is_close(padded[i, : len(row)], alone[i], limit) for i, row in enumerate(rows)):
        raise UsageError(
            f"base_nf4: the logits of {name} change when a shorter row is padded on the right, as training and "
            "evaluation do; choose a model of another family"
        )
    if packing.can_pack(model) and not _is_packed_alike(model, batch, alone, limit):
        packing.IS_PACKABLE[model.get_output_embeddings()] = False
    if reason := packing.obstacle(model):
        progress.say(f"train: {name} {reason}, so rows are padded instead")


def _rows(vocab_size: int) -> list[list[int]]:
    """Return rows of different tokens that begin alike."""
    prefix = [(7 * i + 5) % vocab_size for i in range(PREFIX_LEN)]
    return [
        prefix + [(11 * i + 13 * n + 3) % vocab_size for i in range(length - PREFIX_LEN)]
        for n, length in enumerate(ROW_LENS)
    ]


def _tensor(model: Any, row: list[int]) -> Tensor:
    return torch.tensor([row], device=model.device)


def _is_packed_alike(model: Any, batch: dict[str, Tensor], alone: list[Tensor], limit: float) -> bool:
    micro_batch = prepare(model, batch)
    try:
        with packing.packed_attention(model):
            logits = model(**micro_batch.inputs, use_cache=False).logits[0]  # (T, vocab)
    # A family that calls attention in a way of its own lacks an argument, or has one too many.
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False

    # What predicts a label, row after row.
    expected = torch.cat([row[PREFIX_LEN - 1 : -1] for row in alone])
    return _is_close(logits[micro_batch.label_positions], expected, limit)


def _max_distance(model: Any, row: list[int], expected: Tensor) -> float:
    """Return how far apart two sets of logits may be: three times what rounding the embeddings does, within bounds."""
    generator = torch.Generator().manual_seed(0)

    def round_anew(_: Any, args: Any, output: Tensor) -> Tensor:
        # At most half of the distance between two numbers of this precision, as rounding does.
        factors = 1 + torch.finfo(output.dtype).eps * (torch.rand(output.shape, generator=generator) - 0.5)
        return (output.float() * factors.to(output.device)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(round_anew)
    try:
        rounded = model(input_ids=_tensor(model, row), use_cache=False).logits[0]
    finally:
        hook.remove()
    least = MAX_DISTANCE.get(model.dtype, MAX_DISTANCE_16_BITS)
    # A NaN is not larger than anything.
    return max(least, min(MAX_DISTANCE_OF_ROUNDING, 3 * _distance(rounded, expected)))


def _is_close(logits: Tensor, expected: Tensor, limit: float) -> bool:
    """Return whether the logits (tokens, vocab) are the same but for rounding."""
    # A NaN is no difference of rows; training names it.
    return not _distance(logits, expected) > limit


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Return the distance of two sets of logits (tokens, vocab), relative to the spread of the second."""
    scale = (expected.float() - expected.float().mean(-1, keepdim=True)).norm()
    return float((logits.float() - expected.float()).norm() / scale)
