"""Compute attention over packed rows by the flash kernels that torch itself ships, on an NVIDIA GPU.

`torch.nn.attention.varlen.varlen_attn` takes the rows as segments of one sequence. So there is no padding, no mask in
memory, and no copy of a row: segment n has its queries at `cu_seq_q[n]` to `cu_seq_q[n + 1]`, and its keys at the
places that `cu_seq_k` says.

A shared prefix is a segment of its own. The keys of every other segment are the prefix and the row's own tokens, so
they are more than its queries. The kernel lets the last query see the last key, and every query one key less than the
next, which is what the row would see alone. Keys and values are gathered for that in the forward pass and once more in
the backward pass, so that they take memory only while a layer computes. Without a shared prefix nothing is gathered.

The letters in shapes are those of `attention`, and

    N   segments: the shared prefix, if there is one, and the rows.
    KT  key positions of all segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad

HEAD_WIDTH_MULTIPLE = 8  # the kernels take no other width of a head, and none above 256
# Gathered keys of a micro-batch, as a multiple of its tokens. With 8, one layer's keys, values and their gradients stay
# below what that layer keeps for the backward pass, also with one key/value head for every four query heads.
MAX_KEYS_FACTOR = 8


@cache
def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run on a device and in a type: NVIDIA's Ampere or newer, and 16 bits."""
    is_16_bits = dtype in (torch.bfloat16, torch.float16)
    return is_16_bits and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def fits(suffix_lens: list[int], prefix_len: int, max_tokens: int) -> bool:
    """Return whether the keys of these rows stay within the memory of `max_tokens` tokens."""
    return len(suffix_lens) * prefix_len + sum(suffix_lens) <= MAX_KEYS_FACTOR * max_tokens


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """The segments of a packed batch.

    Attributes:
        cu_seq_q: (N + 1,) int32, where each segment's queries begin among the T tokens
        cu_seq_k: (N + 1,) int32, where each segment's keys begin among the KT key positions
        max_q: the queries of the longest segment
        max_k: the keys of the segment that has most
        prefix_len: the number of tokens in the shared prefix; with 0, KT is T and the three tensors below are empty
        kv_index: (KT,), the token at each key position
        prefix_slots: (N, prefix), the key positions at which each segment has the prefix
        own_slots: (T - prefix,), the key position of each token after the prefix
    """

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    prefix_len: int
    kv_index: Tensor
    prefix_slots: Tensor
    own_slots: Tensor

    @classmethod
    def from_mask(cls, suffix_mask: Tensor, prefix_len: int, _: torch.dtype) -> VarlenLayout:
        """Build the layout, in host memory, from `suffix_mask` (rows, L): true where a row has a token of its own."""
        suffix_lens = suffix_mask.sum(1)
        q_lens = torch.cat([suffix_lens.new_full((1 if prefix_len else 0,), prefix_len), suffix_lens])
        k_lens = q_lens + prefix_len
        k_lens[0] = q_lens[0]  # the prefix sees itself alone; without one, both are equal anyway
        cu_seq_q, cu_seq_k = (pad(lens.cumsum(0), (1, 0)) for lens in (q_lens, k_lens))

        kv_index = prefix_slots = own_slots = cu_seq_q.new_empty(0)
        if prefix_len:
            # Before a token of row r stand the prefix's own segment, the prefixes of rows 0 to r, and earlier suffixes.
            row = torch.arange(len(suffix_lens)).repeat_interleave(suffix_lens)
            own_slots = (row + 2) * prefix_len + torch.arange(len(row))
            prefix_slots = cu_seq_k[:-1, None] + torch.arange(prefix_len)
            kv_index = torch.empty(int(cu_seq_k[-1]), dtype=torch.int64)
            kv_index[prefix_slots] = torch.arange(prefix_len).expand_as(prefix_slots)
            kv_index[own_slots] = prefix_len + torch.arange(len(row))
        return cls(
            cu_seq_q.int(), cu_seq_k.int(), int(q_lens.max()), int(k_lens.max()), prefix_len,
            kv_index, prefix_slots, own_slots,
        )  # fmt: skip


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scaling: float, window: int | None
) -> Tensor:
    """Return (T, H, DV) from `query` (T, H, D), `key` (T, K, D) and `value` (T, K, DV).

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        layout: The segments.
        scaling: The factor of the scores.
        window: The number of tokens that a query sees, itself the last of them; None: all before it.
    """
    value_width, widths = value.shape[-1], (query.shape[-1], value.shape[-1])
    width = -(-max(widths) // HEAD_WIDTH_MULTIPLE) * HEAD_WIDTH_MULTIPLE
    # Zeros change no score. In most models there is nothing to widen, and `pad` would copy.
    if widths != (width, width):
        query, key, value = (pad(x, (0, width - x.shape[-1])) for x in (query, key, value))

    segments = SharedPrefixSegments.apply if layout.prefix_len else flash
    output: Tensor = segments(query, key, value, layout, scaling, window)
    return output[..., :value_width]


def flash(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scaling: float, window: int | None
) -> Tensor:
    """Call the kernel over `query` (T, H, D), `key` (KT, K, D) and `value` (KT, K, D); return (T, H, D)."""
    # The kernel counts the tokens to the left of a query, so without the query itself. -1 stands for all of them.
    left = -1 if window is None or window >= layout.max_k else window - 1
    output: Tensor = varlen_attn(
        query, key, value, layout.cu_seq_q, layout.cu_seq_k, layout.max_q, layout.max_k,
        scale=scaling, window_size=(left, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output


class SharedPrefixSegments(torch.autograd.Function):  # type: ignore[misc]
    """Compute `flash` over keys and values that are gathered for every segment, and gathered again in backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scaling: float, window: int | None
    ) -> Tensor:
        """Return (T, H, D) from `query` (T, H, D), `key` (T, K, D) and `value` (T, K, D)."""
        ctx.save_for_backward(query, key, value)
        ctx.options = layout, scaling, window
        k, v = (x.index_select(0, layout.kv_index) for x in (key, value))  # (KT, K, D)
        return flash(query, k, v, *ctx.options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query (T, H, D), key (T, K, D) and value (T, K, D)."""
        query, key, value = ctx.saved_tensors
        layout: VarlenLayout = ctx.options[0]
        # torch has no public backward for the kernel, and autograd is off inside `backward`.
        with torch.enable_grad():
            q = query.detach().requires_grad_()
            k, v = (x.index_select(0, layout.kv_index).requires_grad_() for x in (key, value))
            output = flash(q, k, v, *ctx.options)
        grad_query, grad_k, grad_v = torch.autograd.grad(output, (q, k, v), grad_output)

        # A token of the prefix is a key in every segment, so its gradient is the sum over them.
        grad_key, grad_value = (
            torch.cat([grad[layout.prefix_slots].sum(0), grad.index_select(0, layout.own_slots)])
            for grad in (grad_k, grad_v)
        )
        return grad_query, grad_key, grad_value, None, None, None
