"""Pack the rows of a micro-batch into one sequence, without padding and with their shared prefix only once.

This is part 2 of the hot path; `fused_lora` is part 1, `memory_efficient` part 3.

    [prefix that all rows share] [suffix of row 1] [suffix of row 2] ...        (1, T)

Every layer but attention treats tokens one by one, so no padding is computed there. The prefix that a chat template
gives to all rows (the system turn) is computed once. Tokens after the last supervised one of a row are left out. In
attention (`attention`) each row sees the prefix and itself, at the positions that it would have alone. Loss and
gradients equal those of the padded batch; nothing is approximated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from components.train_qlora.attention import RowLayout, SharedPrefixAttention
from components.train_qlora.data import IGNORE_INDEX, Batch

PACKED_ATTENTION = {"eager": "packed_eager", "sdpa": "packed_sdpa"}  # by transformers' implementation: ours
# Config fields of attention that is not plain causal; `SharedPrefixAttention` supports no window, cap or chunk.
UNSUPPORTED_OPTIONS = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")
# oneDNN builds and keeps a kernel for every matrix size (20 MB for the products of one layer). Rounding up the number
# of packed tokens, and the length of rows in attention, keeps the number of sizes small.
TOKENS_MULTIPLE, ROW_LENGTH_MULTIPLE = 16, 8
IS_PACKABLE = WeakKeyDictionary[torch.nn.Module, bool]()  # by output layer: what `row_probe` measured


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The rows of a batch as one sequence of T tokens, with the layout from which attention restores the rows.

    Attributes:
        input_ids: (1, T)
        position_ids: (1, T), within each token's own row
        labels: (1, T), the label of the next token; `IGNORE_INDEX` where nothing is learnt
        prefix_len: the number of tokens in the prefix that all rows share
        layout: the layout of the rows
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    prefix_len: int
    layout: RowLayout


def can_pack(model: Any) -> bool:
    """Return whether the model's attention is plain causal attention and goes through transformers' interface."""
    config = model.config.get_text_config()
    is_plain = not any(getattr(config, name, None) for name in UNSUPPORTED_OPTIONS)
    is_full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    is_replaceable = config._attn_implementation in (*PACKED_ATTENTION, *PACKED_ATTENTION.values()) and bool(
        getattr(model, "_supports_attention_backend", False)
    )
    return is_plain and is_full and is_replaceable and IS_PACKABLE.get(model.get_output_embeddings(), True)


def pack(batch: Batch, dtype: torch.dtype) -> PackedBatch:
    """Pack a batch whose rows are padded on the right; `dtype` is that of the attention scores."""
    input_ids, labels = batch["input_ids"], batch["labels"]  # (B, seq)
    next_labels = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, seq): what each position must predict
    mask = batch["attention_mask"].bool() & mask_until_last_label(next_labels != IGNORE_INDEX)
    prefix_len = shared_prefix_len(input_ids, mask, next_labels)
    suffix_mask = lengthen_to_multiple(mask[:, prefix_len:], prefix_len)
    num_rows, suffix_len = suffix_mask.shape

    # Rounding up may reach beyond the padded batch, which is then lengthened. Positions stay below its length, since
    # the model may have no larger ones.
    last_position = input_ids.shape[1] - 1
    input_ids, next_labels = (
        pad(x, (0, max(0, prefix_len + suffix_len - last_position - 1)), value=IGNORE_INDEX)
        for x in (input_ids, next_labels)
    )
    positions = (
        torch.arange(prefix_len + suffix_len, device=input_ids.device).clamp(max=last_position).expand(num_rows, -1)
    )

    def flatten_rows(x: Tensor) -> Tensor:  # (B, seq) to (1, T)
        return torch.cat([x[0, :prefix_len], x[:, prefix_len : prefix_len + suffix_len][suffix_mask]]).unsqueeze(0)

    return PackedBatch(
        flatten_rows(input_ids).clamp(min=0),  # the fill value -100 is no valid token
        flatten_rows(positions),
        flatten_rows(next_labels),
        prefix_len,
        RowLayout.from_mask(suffix_mask, prefix_len, dtype),
    )


def num_micro_batches(batch: Batch, micro_batch_size: int, *, is_packed: bool) -> int:
    """Return the smallest number of micro-batches that fits the memory of `micro_batch_size` padded rows.

    No micro-batch may compute more tokens than those padded rows. Attention pads to the longest row of a micro-batch.
    So one with many short rows beside a long one is split further, until attention computes at most twice their
    positions.
    """
    input_ids, num_rows = batch["input_ids"], len(batch["input_ids"])
    if not is_packed:
        return -(-num_rows // micro_batch_size)
    next_labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    mask = batch["attention_mask"].bool() & mask_until_last_label(next_labels != IGNORE_INDEX)
    prefix_len, row_tokens = shared_prefix_len(input_ids, mask, next_labels), mask.sum(1)
    suffix_lens, max_tokens = (row_tokens - prefix_len).tolist(), micro_batch_size * int(row_tokens.max())

    def fits(lens: list[int]) -> bool:
        return sum(lens) <= max_tokens - prefix_len and len(lens) * max(lens, default=0) <= 2 * max_tokens

    # All suffix tokens together need at least this many micro-batches, so the search begins there.
    min_parts = max(1, sum(suffix_lens) // max(max_tokens - prefix_len, 1))
    return next(
        count
        for count in range(min_parts, num_rows + 1)
        if all(fits(suffix_lens[i * num_rows // count : (i + 1) * num_rows // count]) for i in range(count))
    )


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Split the batch into `count` micro-batches; where rows run out, a micro-batch gets one row without labels."""
    num_rows = len(batch["input_ids"])
    parts = [
        {k: v[i * num_rows // count : (i + 1) * num_rows // count] for k, v in batch.items()} for i in range(count)
    ]
    unlabelled = {k: v[:1] for k, v in batch.items()} | {"labels": torch.full_like(batch["labels"][:1], IGNORE_INDEX)}
    return [part if len(part["input_ids"]) else unlabelled for part in parts]


def mask_until_last_label(is_labelled: Tensor) -> Tensor:
    """Return (B, seq) bool, true up to each row's last labelled position; later positions do not affect the loss."""
    is_needed = is_labelled.flip(1).cumsum(1).flip(1) > 0
    is_needed[:, 0] = True  # a row is never empty
    return is_needed


def shared_prefix_len(input_ids: Tensor, mask: Tensor, next_labels: Tensor) -> int:
    """Return the number of unlabelled tokens that all rows begin with; it is less than any row's length."""
    if len(input_ids) == 1:
        return 0
    is_shared = ((input_ids == input_ids[0]) & mask & (next_labels == IGNORE_INDEX)).all(dim=0)
    # A row needs a token of its own: `attention` gives every row at least one query.
    return min(int(is_shared.int().cumprod(0).sum()), int(mask.sum(1).min()) - 1)


def lengthen_to_multiple(suffix_mask: Tensor, prefix_len: int) -> Tensor:
    """Lengthen the shortest rows of the mask (B, width), so that T is a multiple of `TOKENS_MULTIPLE`.

    An added token comes after all tokens of its row that affect the loss, so none of these sees it.
    """
    num_rows, num_tokens = len(suffix_mask), int(suffix_mask.sum())
    num_added = -(prefix_len + num_tokens) % TOKENS_MULTIPLE
    width = max(int(suffix_mask.any(0).sum()), -(-(num_tokens + num_added) // num_rows))
    width = -(-width // ROW_LENGTH_MULTIPLE) * ROW_LENGTH_MULTIPLE

    # In column-major order the first free places are those of the shortest rows, so no row gets a gap.
    by_column = pad(suffix_mask, (0, max(0, width - suffix_mask.shape[1])))[:, :width].T.contiguous()
    by_column.view(-1)[(~by_column).view(-1).nonzero()[:num_added, 0]] = True
    return by_column.T


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Switch the model to packed attention inside the context, where it supports that; may be nested."""
    config = model.config.get_text_config()
    original_implementation = config._attn_implementation
    if can_pack(model):
        config._attn_implementation = PACKED_ATTENTION.get(original_implementation, original_implementation)
    try:
        yield
    finally:
        config._attn_implementation = original_implementation


def packed_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scaling: float,
    packed_batch: PackedBatch,
    use_sdpa: bool,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each row; (1, H, T, D) in, (1, T, H, DV) out.

    `use_sdpa` selects torch's fused kernel. The eager version is faster for short rows on a CPU.
    """
    # Where weights are wider than the compute type, rotary embeddings leave queries and keys wider than values.
    # (1, H, T, D), (1, K, T, D), (1, K, T, DV) to (T, H, D), (T, K, D), (T, K, DV)
    # `squeeze`, since the gradient of an index is a copy.
    qkv = (x.squeeze(0).transpose(0, 1).to(packed_batch.layout.attn_bias.dtype) for x in (query, key, value))
    attn_output: Tensor = SharedPrefixAttention.apply(*qkv, packed_batch.layout, scaling, use_sdpa)
    return attn_output.unsqueeze(0), None


for implementation, packed_name in PACKED_ATTENTION.items():
    AttentionInterface.register(packed_name, partial(packed_attention_forward, use_sdpa=implementation == "sdpa"))
    AttentionMaskInterface.register(packed_name, lambda *_, **__: None)  # `RowLayout.attn_bias` is the mask
