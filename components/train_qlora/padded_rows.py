"""Compute causal attention over packed rows by padding them: the backends `eager` and `sdpa` of `attention`.

The tokens are gathered into padded rows, all rows are computed as one batch in a few operations, and the outputs go
back to the T tokens.

The backward pass is written by hand. Autograd would keep padded copies of queries, keys, values and scores for every
layer. Here only the packed queries, keys and values are kept, and the rest is recomputed. So a prefix that many short
rows share takes its memory only once. Long rows are computed in blocks of queries, each over the keys up to its last
query: what would be masked is left out, and the scores of a block stay in the cache.

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

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

KV_LENGTH_MULTIPLE = (
    32  # S is padded to a multiple: on a CPU, softmax over 57 bf16 numbers takes three times as long as over 64
)
BLOCK_LENGTH = 128  # query positions; rows of 1,024 tokens take half the time of one block, shorter blocks no less


@dataclass(frozen=True, slots=True)
class HeadIndex:
    """Indices between packed tokens and rows for a number of heads, into tensors flattened to (N, D).

    Attributes:
        q_index: (R * H * L,) for each query position, its query among the packed (T * H), block after block
        kv_index: (R * K * S,) for each key position, its key or value among the packed (T * K)
        q_inverse: (T * H,) for each packed query, its position in `q_index`
        own_kv_index: ((T - prefix) * K,) for each packed key after the prefix, its position in `kv_index`
        attn_biases: for each block of query positions, (R * K, H / K * block, keys up to its last), added to the scores
    """

    q_index: Tensor
    kv_index: Tensor
    q_inverse: Tensor
    own_kv_index: Tensor
    attn_biases: tuple[Tensor, ...]

    def blocks(self, x: Tensor) -> list[Tensor]:
        """View x (R * H * L, D) by blocks, each (R * K, H / K * block, D)."""
        shapes = [bias.shape[:2] for bias in self.attn_biases]
        parts = x.split([shape.numel() for shape in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of a packed batch, padded to one length; chunks of the shared prefix are rows of their own.

    Attributes:
        query_tokens: (R, L), the token at each query position; any token where the row has none
        key_tokens: (R, S), the token at each key position: the prefix, the row's own tokens, padding
        token_slots: (T,), the position of each token among the (R * L) query positions
        attn_bias: (R, L, S), added to the scores: 0 where a query may see a key, else the lowest number
        prefix_len: the number of tokens in the shared prefix
        use_sdpa: whether torch's fused attention computes the rows; eager operations are faster for short rows on a CPU
        head_indices: the cache of `head_index`, by its arguments
    """

    query_tokens: Tensor
    key_tokens: Tensor
    token_slots: Tensor
    attn_bias: Tensor
    prefix_len: int
    use_sdpa: bool
    head_indices: dict[tuple[int, int, int], HeadIndex] = field(default_factory=dict)

    @classmethod
    def from_mask(cls, suffix_mask: Tensor, prefix_len: int, dtype: torch.dtype, *, use_sdpa: bool) -> RowLayout:
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
        return cls(query_tokens, key_tokens, token_slots, attn_bias, prefix_len, use_sdpa)

    def head_index(self, num_heads: int, num_kv_heads: int, block_length: int) -> HeadIndex:
        """Return the indices for a number of heads and a length of blocks; they are built once for all layers."""
        index = self.head_indices.get((num_heads, num_kv_heads, block_length))
        if index is None:
            length, kv_length = self.attn_bias.shape[1:]
            head, kv_head = (torch.arange(n, device=self.query_tokens.device) for n in (num_heads, num_kv_heads))
            row, column = (self.token_slots // length)[:, None], (self.token_slots % length)[:, None]
            own_row, own_column = row[self.prefix_len :], column[self.prefix_len :]

            # Heads come before positions within a row, so that one batched product serves every head of a row. The
            # H / K query heads of a group lie side by side: they multiply the same keys and values.
            q_indices, biases = [], []
            for start in range(0, length, block_length):
                end = min(start + block_length, length)
                q_indices.append((self.query_tokens[:, None, start:end] * num_heads + head[:, None]).view(-1))
                num_keys = -(-(self.prefix_len + end) // KV_LENGTH_MULTIPLE) * KV_LENGTH_MULTIPLE
                bias = self.attn_bias[:, None, None, start:end, :num_keys]
                bias = bias.expand(-1, num_kv_heads, num_heads // num_kv_heads, -1, -1)
                biases.append(bias.reshape(len(bias) * num_kv_heads, -1, num_keys))

            # All blocks before that of a token are full.
            block_start = column // block_length * block_length
            own_block_length = (length - block_start).clamp(max=block_length)
            first = block_start * len(self.query_tokens) * num_heads
            index = self.head_indices[num_heads, num_kv_heads, block_length] = HeadIndex(
                q_index=torch.cat(q_indices),
                kv_index=(self.key_tokens.unsqueeze(1) * num_kv_heads + kv_head[:, None]).view(-1),
                q_inverse=(first + (row * num_heads + head) * own_block_length + column - block_start).view(-1),
                own_kv_index=((own_row * num_kv_heads + kv_head) * kv_length + self.prefix_len + own_column).view(-1),
                attn_biases=tuple(biases),
            )
        return index


class SharedPrefixAttention(torch.autograd.Function):  # type: ignore[misc]
    """Compute softmax(scaling * q kᵀ + bias) v in each row; with grouped-query attention, K is smaller than H."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scaling: float, window: None
    ) -> Tensor:
        """Return (T, H, DV) from `query` (T, H, D), `key` (T, K, D) and `value` (T, K, DV)."""
        block_length = layout.attn_bias.shape[1] if layout.use_sdpa else BLOCK_LENGTH
        index = layout.head_index(query.shape[1], key.shape[1], block_length)
        q, k, v = gather_rows(query, key, value, index)  # (R * H * L, D), (R * K, S, D), (R * K, S, DV)
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.index, ctx.scaling = layout, index, scaling

        row_forward = sdpa_forward if layout.use_sdpa else eager_forward
        attn_output = row_forward(q, k, v, index, layout, scaling)
        return flatten_tokens(attn_output).index_select(0, index.q_inverse).view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query (T, H, D), key (T, K, D) and value (T, K, DV)."""
        query, key, value = ctx.saved_tensors
        index = ctx.index
        rows = gather_rows(query, key, value, index)  # recomputed to save memory: see the module docstring
        grad_attn_output = scatter_rows(grad_output, index)  # (R * H * L, DV)

        row_backward = sdpa_backward if ctx.layout.use_sdpa else eager_backward
        grad_query, grad_key, grad_value = row_backward(grad_attn_output, *rows, index, ctx.layout, ctx.scaling)

        grad_query = flatten_tokens(grad_query).index_select(0, index.q_inverse).view(query.shape)
        grad_key, grad_value = (
            reduce_kv_grad(grad_key, index, ctx.layout, key.shape),
            reduce_kv_grad(grad_value, index, ctx.layout, value.shape),
        )
        return grad_query, grad_key, grad_value, None, None, None


def gather_rows(query: Tensor, key: Tensor, value: Tensor, index: HeadIndex) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the packed tokens into rows: queries (R * H * L, D), keys (R * K, S, D), values (R * K, S, DV)."""
    num_rows, _, kv_length = index.attn_biases[-1].shape
    k = flatten_tokens(key).index_select(0, index.kv_index).view(num_rows, kv_length, -1)
    v = flatten_tokens(value).index_select(0, index.kv_index).view(num_rows, kv_length, -1)
    return flatten_tokens(query).index_select(0, index.q_index), k, v


def attention_probs(query: Tensor, key: Tensor, attn_bias: Tensor, scaling: float) -> Tensor:
    """Return the attention probabilities of a block, (R * K, H / K * block, S)."""
    return torch.baddbmm(attn_bias, query, key.transpose(1, 2), alpha=scaling).softmax(-1)


def eager_forward(query: Tensor, key: Tensor, value: Tensor, index: HeadIndex, _: RowLayout, scaling: float) -> Tensor:
    """Return the attention output, (R * H * L, DV), block after block."""
    attn_output = value.new_empty(len(query), value.shape[2])
    for q, output, bias in zip(index.blocks(query), index.blocks(attn_output), index.attn_biases, strict=True):
        k, v = key[:, : bias.shape[2]], value[:, : bias.shape[2]]
        torch.bmm(attention_probs(q, k, bias, scaling), v, out=output)
    return attn_output


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
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    blocks = zip(*map(index.blocks, (query, grad_query, grad_attn_output)), index.attn_biases, strict=True)
    for q, grad_q, grad_output, bias in blocks:
        k, v, grad_k, grad_v = (x[:, : bias.shape[2]] for x in (key, value, grad_key, grad_value))
        probs = attention_probs(q, k, bias, scaling)

        # With P the probabilities, S the scores: dS = P * (dP - sum(dP * P)), dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
        grad_probs = torch.bmm(grad_output, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        torch.bmm(grad_scores, k, out=grad_q)
        grad_k.baddbmm_(grad_scores.transpose(1, 2), q)
        grad_v.baddbmm_(probs.transpose(1, 2), grad_output)
    # Here and not on the scores, which are more numbers.
    return grad_query.mul_(scaling), grad_key.mul_(scaling), grad_value


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
        attn_output = sdpa_forward(q, k, v, index, layout, scaling)
    grads: tuple[Tensor, ...] = torch.autograd.grad(attn_output, (q, k, v), grad_attn_output.view(attn_output.shape))
    return grads


def sdpa_forward(query: Tensor, key: Tensor, value: Tensor, _: HeadIndex, layout: RowLayout, scaling: float) -> Tensor:
    """Return the attention output by torch's fused attention, (R, H, L, DV)."""
    num_rows, length, _ = layout.attn_bias.shape
    num_kv_heads = len(key) // num_rows
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


def rows_fit(suffix_lens: list[int], _: int, max_tokens: int) -> bool:
    """Return whether attention, which pads to the longest row, computes at most twice the positions of the tokens."""
    return len(suffix_lens) * max(suffix_lens, default=0) <= 2 * max_tokens
