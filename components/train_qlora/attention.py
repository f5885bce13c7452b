"""Causal attention in the rows of a line (`packed`), forwards and backwards in a few operations over all rows at once.

Written by hand because autograd, over the dozen operations that find rows in a line, keeps padded copies of queries,
keys, values and scores for every layer. Here the line's own are kept, and the rest is made again: a beginning that
many short rows share costs no memory in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

PLACES = 32  # a row looks at a multiple of so many: softmax over 57 bf16 numbers takes a CPU three times that over 64


@dataclass(frozen=True, slots=True)
class Heads:
    """Where things are, for so many heads: indices into what is flattened to (..., width).

    Attributes:
        asked: (rows * heads * length,) of queries, in the line's (tokens * heads)
        seen: (rows * groups * places,) of keys and values, in the line's (tokens * groups)
        asking: (tokens * heads,) of the line's queries, among those asked
        own: ((tokens - shared) * groups,) of the line's keys after the shared ones, among those seen
        bias: (rows * groups, heads a group * length, places), to add to the scores
    """

    asked: Tensor
    seen: Tensor
    asking: Tensor
    own: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows of a line, all of one length, filled up; the shared tokens, cut to that length, are rows of their own.

    Attributes:
        ask: (rows, length) the token of the line that asks at each place; any where none does
        see: (rows, places) likewise of those that are looked at: the shared ones, the row's own, and filling
        place: (tokens,) where in (rows * length) a token of the line is
        bias: (rows, length, places) to add to the scores: 0 where a row may look, else the lowest number
        shared: tokens that all rows begin with
    """

    ask: Tensor
    see: Tensor
    place: Tensor
    bias: Tensor
    shared: int
    made: dict[tuple[int, int], Heads] = field(default_factory=dict)

    @classmethod
    def of(cls, rest: Tensor, shared: int, dtype: torch.dtype) -> Grid:
        """`rest` (rows, length) bool: where there are tokens, after the shared ones."""
        length, device = rest.shape[1], rest.device
        cuts = -(-shared // length)  # rows for the shared tokens
        of_shared = torch.arange(cuts * length, device=device).view(cuts, length)
        numbers = (shared - 1 + rest.reshape(-1).cumsum(0)).view(rest.shape)
        ask = torch.cat([of_shared.clamp(max=max(shared - 1, 0)), numbers.clamp(min=0)])
        filling = -(shared + length) % PLACES
        see = pad(torch.cat([torch.arange(shared, device=device).expand(len(ask), -1), ask], dim=1), (0, filling))
        earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        own = torch.cat([rest.new_zeros(cuts, length, length), earlier & rest.unsqueeze(1)])
        before = of_shared.unsqueeze(2) >= torch.arange(shared, device=device)
        beginning = torch.cat([before, rest.new_ones(len(rest), length, shared)])
        may = pad(torch.cat([beginning, own], dim=2), (0, filling))
        bias = torch.zeros(may.shape, dtype=dtype, device=device).masked_fill_(~may, torch.finfo(dtype).min)
        place = torch.cat([of_shared.view(-1)[:shared], cuts * length + rest.reshape(-1).nonzero().squeeze(1)])
        return cls(ask, see, place, bias, shared)

    def heads(self, heads: int, groups: int) -> Heads:
        """For so many heads, in groups that share keys and values; made once for all layers."""
        found = self.made.get((heads, groups))
        if found is None:
            length, seen = self.bias.shape[1:]
            head, group = (torch.arange(n, device=self.ask.device) for n in (heads, groups))
            row, column = self.place // length, self.place % length
            own_row, own_column = row[self.shared :, None], column[self.shared :, None]
            each = self.bias[:, None, None].expand(-1, groups, heads // groups, -1, -1)
            found = self.made[heads, groups] = Heads(
                asked=(self.ask.unsqueeze(1) * heads + head[:, None]).view(-1),
                seen=(self.see.unsqueeze(1) * groups + group[:, None]).view(-1),
                asking=((row[:, None] * heads + head) * length + column[:, None]).view(-1),
                own=((own_row * groups + group) * seen + self.shared + own_column).view(-1),
                bias=each.reshape(-1, heads // groups * length, seen),
            )
        return found


class ByRows(torch.autograd.Function):  # type: ignore[misc]
    """softmax(s · q kᵀ + bias) v in each row; keys and values may have fewer heads, each for a group of the others."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scaling: float, fused: bool) -> Tensor:
        """`query` (tokens, heads, width), `key` (tokens, groups, width), `value` (tokens, groups, width of its own).

        Returns (tokens, heads, width of a value).
        """
        at = grid.heads(query.shape[1], key.shape[1])
        q, k, v = in_rows(query, key, value, at)
        ctx.save_for_backward(query, key, value)
        ctx.grid, ctx.scaling, ctx.fused = grid, scaling, fused
        mixed = by_kernel(q, k, v, grid, scaling) if fused else torch.bmm(shares(q, k, at, scaling), v)
        return flat(mixed).index_select(0, at.asking).view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of queries, keys and values."""
        query, key, value = ctx.saved_tensors
        at = ctx.grid.heads(query.shape[1], key.shape[1])
        rows = in_rows(query, key, value, at)
        of_mixed = spread(upstream, at).view(*rows[0].shape[:2], -1)
        by = of_kernel if ctx.fused else of_shares
        of_query, of_key, of_value = by(of_mixed, *rows, at, ctx.grid, ctx.scaling)
        of_query = flat(of_query).index_select(0, at.asking).view(query.shape)
        of_key, of_value = gathered(of_key, at, ctx.grid, key.shape), gathered(of_value, at, ctx.grid, value.shape)
        return of_query, of_key, of_value, None, None, None


def in_rows(query: Tensor, key: Tensor, value: Tensor, at: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """(rows * groups, heads a group * length, width) of queries, (rows * groups, places, width) of others."""
    batch, asked, seen = at.bias.shape
    q = flat(query).index_select(0, at.asked).view(batch, asked, -1)
    k, v = (flat(x).index_select(0, at.seen).view(batch, seen, -1) for x in (key, value))
    return q, k, v


def shares(query: Tensor, key: Tensor, at: Heads, scaling: float) -> Tensor:
    """How much each place looks at each other, (rows * groups, heads a group * length, places)."""
    return torch.baddbmm(at.bias, query, key.transpose(1, 2), alpha=scaling).softmax(-1)


def of_shares(
    of_mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, at: Heads, grid: Grid, scaling: float
) -> tuple[Tensor, ...]:
    """The gradients of the three in rows, written out."""
    share = shares(query, key, at, scaling)
    of_share = torch.bmm(of_mixed, value.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_share, share, -1, share.dtype).mul_(scaling)
    of_key = torch.bmm(of_scores.transpose(1, 2), query)
    return torch.bmm(of_scores, key), of_key, torch.bmm(share.transpose(1, 2), of_mixed)


def of_kernel(
    of_mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, at: Heads, grid: Grid, scaling: float
) -> tuple[Tensor, ...]:
    """The same by torch's kernel."""
    with torch.enable_grad():
        q, k, v = (x.requires_grad_() for x in (query, key, value))
        mixed = by_kernel(q, k, v, grid, scaling)
    found: tuple[Tensor, ...] = torch.autograd.grad(mixed, (q, k, v), of_mixed.view(mixed.shape))
    return found


def by_kernel(query: Tensor, key: Tensor, value: Tensor, grid: Grid, scaling: float) -> Tensor:
    """What is looked at, by torch's kernel; (rows, heads, length, width of a value)."""
    rows, length, _ = grid.bias.shape
    groups = len(query) // rows
    q = query.view(rows, -1, length, query.shape[-1])
    k, v = (x.view(rows, groups, -1, x.shape[-1]) for x in (key, value))
    bias = grid.bias.unsqueeze(1)
    return scaled_dot_product_attention(q, k, v, bias, scale=scaling, enable_gqa=q.shape[1] != groups)


def spread(upstream: Tensor, at: Heads) -> Tensor:
    """The gradient of the line at the places of its rows, 0 elsewhere; (rows * heads * length, width)."""
    of_rows = upstream.new_zeros(len(at.asked), upstream.shape[-1])
    return of_rows.index_copy_(0, at.asking, flat(upstream))


def gathered(of_rows: Tensor, at: Heads, grid: Grid, shape: torch.Size) -> Tensor:
    """The gradient of the line's keys or values: for the shared ones what all rows give them."""
    own = flat(of_rows).index_select(0, at.own).view(-1, *shape[1:])
    if not grid.shared:
        return own
    by_row = of_rows.view(-1, shape[1], of_rows.shape[1], shape[2])  # (rows, groups, places, width)
    return torch.cat([by_row[:, :, : grid.shared].sum(0).transpose(0, 1), own])


def flat(x: Tensor) -> Tensor:
    """(..., width) as (all, width)."""
    return x.reshape(-1, x.shape[-1])
