"""Compute causal attention over packed rows: the backends, and the one for a CPU.

`packing` lays out the rows of a micro-batch as one sequence of T tokens, with their shared prefix only once. A backend
computes attention over it. `BACKENDS` has three: `eager` and `sdpa`, which are below, and `varlen`, which has a module
of its own and takes the place of `sdpa` where its kernels run.

Below, the tokens are gathered into padded rows, all rows are computed as one batch in a few operations, and the outputs
go back to the T tokens.

The backward pass is written by hand. Autograd would keep padded copies of queries, keys, values and scores for every
layer. Here only the packed queries, keys and values are kept, and the rest is recomputed. So a prefix that many short
rows share takes its memory only once.

The letters in shapes:

    T   tokens of the packed batch, the shared prefix first.
    R   rows: the prefix in chunks of L tokens, then one row for each suffix.
    L   query positions of a row.
    S   key positions of a row: the prefix, the row's own tokens, padding.
    H   query heads.
    K   key/value heads; H is a multiple of K.
    D   width of a head.
    DV  width of a value's head, which may differ from D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from components.train_qlora import varlen

KV_LENGTH_MULTIPLE = (
    32  # S is padded to a multiple: on a CPU, softmax over 57 bf16 numbers takes three times as long as over 64
)


@dataclass(frozen=True, slots=True)
class HeadIndex:
    """Indices between packed tokens and rows for a number of heads, into tensors flattened to (N, D).

    Attributes:
        q_index: (R * H * L,) for each query position, its query among the packed (T * H)
        kv_index: (R * K * S,) for each key position, its key or value among the packed (T * K)
        q_inverse: (T * H,) for each packed query, its position in `q_index`
        own_kv_index: ((T - prefix) * K,) for each packed key after the prefix, its position in `kv_index`
        attn_bias: (R * K, H / K * L, S), added to the scores
    """

    q_index: Tensor
    kv_index: Tensor
    q_inverse: Tensor
    own_kv_index: Tensor
    attn_bias: Tensor


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of a packed batch, padded to one length; chunks of the shared prefix are rows of their own.

    Attributes:
        query_tokens: (R, L), the token at each query position; any token where the row has none
        key_tokens: (R, S), the token at each key position: the prefix, the row's own tokens, padding
        token_slots: (T,), the position of each token among the (R * L) query positions
        attn_bias: (R, L, S), added to the scores: 0 where a query may see a key, else the lowest number
        prefix_len: the number of tokens in the shared prefix
        head_indices: the cache of `head_index`, by (query heads, key/value heads)
    """

    query_tokens: Tensor
    key_tokens: Tensor
    token_slots: Tensor
    attn_bias: Tensor
    prefix_len: int
    head_indices: dict[tuple[int, int], HeadIndex] = field(default_factory=dict)

    @classmethod
    def from_mask(cls, suffix_mask: Tensor, prefix_len: int, dtype: torch.dtype) -> RowLayout:
        """Build the layout from `suffix_mask` (rows, L), true where a row has a token after the shared prefix."""
        length, device = suffix_mask.shape[1], suffix_mask.device

        # Packed suffix tokens follow the prefix in row-major order, so a running count over the mask numbers them.
        num_chunks = -(-prefix_len // length)
        prefix_positions = torch.arange(num_chunks * length, device=device).view(num_chunks, length)  # (chunks, L)
        suffix_tokens = (prefix_len - 1 + suffix_mask.reshape(-1).cumsum(0)).view(suffix_mask.shape)  # (rows, L)
        query_tokens = torch.cat([prefix_positions.clamp(max=max(prefix_len - 1, 0)), suffix_tokens.clamp(min=0)])

        # Every row carries its own copy of the prefix's positions; the tokens themselves are gathered per layer.
        padding = -(prefix_len + length) % KV_LENGTH_MULTIPLE
        key_tokens = pad(
            torch.cat([torch.arange(prefix_len, device=device).expand(len(query_tokens), -1), query_tokens], dim=1),
            (0, padding),
        )

        # A suffix sees the whole prefix and its own earlier tokens. A chunk of the prefix sees earlier prefix tokens
        # through the prefix's key positions alone: through its own positions it would see them twice.
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        sees_own = torch.cat([suffix_mask.new_zeros(num_chunks, length, length), causal & suffix_mask.unsqueeze(1)])
        chunk_sees_prefix = prefix_positions.unsqueeze(2) >= torch.arange(prefix_len, device=device)
        sees_prefix = torch.cat([chunk_sees_prefix, suffix_mask.new_ones(len(suffix_mask), length, prefix_len)])
        # (R, L, prefix) and (R, L, L) side by side, then padding: (R, L, S)
        is_visible = pad(torch.cat([sees_prefix, sees_own], dim=2), (0, padding))

        # Softmax turns the lowest number into exactly 0, so any token may fill a padded position.
        attn_bias = torch.zeros(is_visible.shape, dtype=dtype, device=device).masked_fill_(
            ~is_visible, torch.finfo(dtype).min
        )
        token_slots = torch.cat(
            [prefix_positions.view(-1)[:prefix_len], num_chunks * length + suffix_mask.reshape(-1).nonzero().squeeze(1)]
        )
        return cls(query_tokens, key_tokens, token_slots, attn_bias, prefix_len)

    def head_index(self, num_heads: int, num_kv_heads: int) -> HeadIndex:
        """Return the indices for a number of heads; they are built once for all layers."""
        index = self.head_indices.get((num_heads, num_kv_heads))
        if index is None:
            length, kv_length = self.attn_bias.shape[1:]
            head, kv_head = (torch.arange(n, device=self.query_tokens.device) for n in (num_heads, num_kv_heads))
            row, column = self.token_slots // length, self.token_slots % length
            own_row, own_column = row[self.prefix_len :, None], column[self.prefix_len :, None]

            # Heads come before positions within a row, so that one batched product serves every head of a row. The
            # H / K query heads of a group lie side by side: they multiply the same keys and values.
            bias = self.attn_bias[:, None, None].expand(-1, num_kv_heads, num_heads // num_kv_heads, -1, -1)
            index = self.head_indices[num_heads, num_kv_heads] = HeadIndex(
                q_index=(self.query_tokens.unsqueeze(1) * num_heads + head[:, None]).view(-1),
                kv_index=(self.key_tokens.unsqueeze(1) * num_kv_heads + kv_head[:, None]).view(-1),
                q_inverse=((row[:, None] * num_heads + head) * length + column[:, None]).view(-1),
                own_kv_index=((own_row * num_kv_heads + kv_head) * kv_length + self.prefix_len + own_column).view(-1),
                attn_bias=bias.reshape(-1, num_heads // num_kv_heads * length, kv_length),
            )
        return index


class SharedPrefixAttention(torch.autograd.Function):  # type: ignore[misc]
    """Compute softmax(scaling * q kᵀ + bias) v in each row; with grouped-query attention, K is smaller than H."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float, use_sdpa: bool
    ) -> Tensor:
        """Return (T, H, DV) from `query` (T, H, D), `key` (T, K, D) and `value` (T, K, DV)."""
        index = layout.head_index(query.shape[1], key.shape[1])
        q, k, v = gather_rows(query, key, value, index)  # (R * K, H / K * L, D), (R * K, S, D), (R * K, S, DV)
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scaling, ctx.use_sdpa = layout, scaling, use_sdpa

        attn_output = (
            sdpa_forward(q, k, v, layout, scaling) if use_sdpa else torch.bmm(attention_probs(q, k, index, scaling), v)
        )
        return flatten_tokens(attn_output).index_select(0, index.q_inverse).view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query (T, H, D), key (T, K, D) and value (T, K, DV)."""
        query, key, value = ctx.saved_tensors
        index = ctx.layout.head_index(query.shape[1], key.shape[1])
        rows = gather_rows(query, key, value, index)  # recomputed to save memory: see the module docstring
        grad_attn_output = scatter_rows(grad_output, index).view(*rows[0].shape[:2], -1)  # (R * K, H / K * L, DV)

        row_backward = sdpa_backward if ctx.use_sdpa else eager_backward
        grad_query, grad_key, grad_value = row_backward(grad_attn_output, *rows, index, ctx.layout, ctx.scaling)

        grad_query = flatten_tokens(grad_query).index_select(0, index.q_inverse).view(query.shape)
        grad_key, grad_value = (
            reduce_kv_grad(grad_key, index, ctx.layout, key.shape),
            reduce_kv_grad(grad_value, index, ctx.layout, value.shape),
        )
        return grad_query, grad_key, grad_value, None, None, None


def gather_rows(query: Tensor, key: Tensor, value: Tensor, index: HeadIndex) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the packed tokens into rows: queries (R * K, H / K * L, D), keys (R * K, S, D), values (R * K, S, DV)."""
    batch, length, kv_length = index.attn_bias.shape
    q = flatten_tokens(query).index_select(0, index.q_index).view(batch, length, -1)
    k = flatten_tokens(key).index_select(0, index.kv_index).view(batch, kv_length, -1)
    v = flatten_tokens(value).index_select(0, index.kv_index).view(batch, kv_length, -1)
    return q, k, v


def attention_probs(query: Tensor, key: Tensor, index: HeadIndex, scaling: float) -> Tensor:
    """Return the attention probabilities, (R * K, H / K * L, S)."""
    return torch.baddbmm(index.attn_bias, query, key.transpose(1, 2), alpha=scaling).softmax(-1)


def eager_backward(
    grad_attn_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: HeadIndex,
    layout: RowLayout,
    scaling: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys and values in rows, by the formulas of softmax attention."""
    probs = attention_probs(query, key, index, scaling)

    # With P the probabilities and S the scores: dS = P * (dP - sum(dP * P)), then dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
    grad_probs = torch.bmm(grad_attn_output, value.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype).mul_(scaling)
    grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
    return torch.bmm(grad_scores, key), grad_key, torch.bmm(probs.transpose(1, 2), grad_attn_output)


def sdpa_backward(
    grad_attn_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: HeadIndex,
    layout: RowLayout,
    scaling: float,
) -> tuple[Tensor, ...]:
    """Return the same gradients as `eager_backward`, by running torch's fused attention once more under autograd."""
    # torch has no public backward for the kernel that it picks, and autograd is off inside `backward`.
    with torch.enable_grad():
        q, k, v = (x.requires_grad_() for x in (query, key, value))
        attn_output = sdpa_forward(q, k, v, layout, scaling)
    grads: tuple[Tensor, ...] = torch.autograd.grad(attn_output, (q, k, v), grad_attn_output.view(attn_output.shape))
    return grads


def sdpa_forward(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float) -> Tensor:
    """Return the attention output by torch's fused attention, (R, H, L, DV)."""
    num_rows, length, _ = layout.attn_bias.shape
    num_kv_heads = len(query) // num_rows
    q = query.view(num_rows, -1, length, query.shape[-1])  # (R, H, L, D)
    k, v = (x.view(num_rows, num_kv_heads, -1, x.shape[-1]) for x in (key, value))  # (R, K, S, D), (R, K, S, DV)
    bias = layout.attn_bias.unsqueeze(1)  # (R, 1, L, S)
    return scaled_dot_product_attention(q, k, v, bias, scale=scaling, enable_gqa=q.shape[1] != num_kv_heads)


def scatter_rows(grad_output: Tensor, index: HeadIndex) -> Tensor:
    """Copy the gradient of the packed tokens to their query positions, (R * H * L, DV), with 0 elsewhere."""
    # The forward pass drops what a padded position computes, so its gradient is 0.
    grad_rows = grad_output.new_zeros(len(index.q_index), grad_output.shape[-1])
    return grad_rows.index_copy_(0, index.q_inverse, flatten_tokens(grad_output))


def reduce_kv_grad(grad_rows: Tensor, index: HeadIndex, layout: RowLayout, shape: torch.Size) -> Tensor:
    """Return the gradient of the packed keys or values; that of the prefix is summed over all rows that see it."""
    # Padded key positions are left out: their probabilities are 0, and so are their gradients.
    grad_own = flatten_tokens(grad_rows).index_select(0, index.own_kv_index).view(-1, *shape[1:])  # (T - prefix, K, D)
    if not layout.prefix_len:
        return grad_own

    # A token of the prefix is the same key in every row, so its gradient is the sum over the rows.
    by_row = grad_rows.view(-1, shape[1], grad_rows.shape[1], shape[2])  # (R, K, S, D)
    return torch.cat([by_row[:, :, : layout.prefix_len].sum(0).transpose(0, 1), grad_own])


def flatten_tokens(x: Tensor) -> Tensor:
    """Reshape (..., D) to (N, D)."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute attention over a packed batch.

    Attributes:
        new_layout: takes (suffix mask, prefix length, type of the scores) and returns the layout, in host memory
        attend: takes (query (T, H, D), key (T, K, D), value (T, K, DV), layout, scaling, window), returns (T, H, DV)
        fits: takes (suffix lengths, prefix length, tokens), returns whether attention stays in the memory of the tokens
        has_windows: whether a layer may see only the last tokens; without it, `window` is always None
        shares_prefix: whether the tokens that all rows begin with are computed once
    """

    new_layout: Callable[[Tensor, int, torch.dtype], Any]
    attend: Callable[..., Tensor]
    fits: Callable[[list[int], int, int], bool]
    has_windows: bool = False
    shares_prefix: bool = True


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float, window: None, *, use_sdpa: bool
) -> Tensor:
    """Compute attention in padded rows; the eager version is faster for short rows on a CPU."""
    output: Tensor = SharedPrefixAttention.apply(query, key, value, layout, scaling, use_sdpa)
    return output


def rows_fit(suffix_lens: list[int], _: int, max_tokens: int) -> bool:
    """Return whether attention, which pads to the longest row, computes at most twice the positions of the tokens."""
    return len(suffix_lens) * max(suffix_lens, default=0) <= 2 * max_tokens


BACKENDS = {
    "eager": Backend(RowLayout.from_mask, partial(attend_rows, use_sdpa=False), rows_fit),
    "sdpa": Backend(RowLayout.from_mask, partial(attend_rows, use_sdpa=True), rows_fit),
    "varlen": Backend(varlen.VarlenLayout.from_mask, varlen.attend, varlen.fits, has_windows=True),
}
