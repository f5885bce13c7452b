"""The hot path, second half: the rows of a batch as one line of tokens, without padding and what they begin with once.

    [what all rows begin with] [rest of row 1] [rest of row 2] ...        (1, tokens)

Every layer but attention treats tokens one by one, so none of them sees padding; the beginning that a chat template
gives all rows (the system turn) costs as much as one row's, and what follows the last position that predicts a
supervised token costs nothing. In attention each row sees the beginning and itself, at the
positions that it has alone. The loss and the gradients are those of the padded batch; it is exact, not approximate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from components.train_qlora.rows import IGNORED, Batch

WAYS = {"eager": "rows_eager", "sdpa": "rows_sdpa"}  # transformers' names for attention, and ours for it by rows
OWN_WAYS = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")  # attention that is not plain causal


@dataclass(frozen=True, slots=True)
class Line:
    """A batch as one line of tokens, and how attention finds its rows again.

    Attributes:
        input_ids: (1, tokens)
        position_ids: (1, tokens), in each token's own row
        labels: (1, tokens), the label of the next token; `IGNORED` where nothing is learned
        shared: tokens that all rows begin with
        rows: rows in the batch
        longest: tokens of the longest row, the shared ones not counted
        places: (tokens - shared,) where a token is in (rows * longest)
        bias: (rows, longest, shared + longest) to add to the scores: 0 where a row may look, else the lowest number
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    shared: int
    rows: int
    longest: int
    places: Tensor
    bias: Tensor


def can_pack(model: Any) -> bool:
    """Whether the model's attention is plain and goes through transformers' interface."""
    config = model.config.get_text_config()
    plain = not any(getattr(config, name, None) for name in OWN_WAYS)
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    ours = config._attn_implementation in (*WAYS, *WAYS.values()) and bool(
        getattr(model, "_supports_attention_backend", False)
    )
    return plain and full and ours


def pack(batch: Batch, dtype: torch.dtype) -> Line:
    """One line of a padded batch, in which rows are padded on the right."""
    ids, labels = batch["input_ids"], batch["labels"]
    after = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # what each position is to predict
    mask = batch["attention_mask"].bool() & before_the_last(after != IGNORED)
    shared = shared_tokens(ids, mask, after)
    rest = mask[:, shared:]
    rows, longest = rest.shape
    places = rest.reshape(-1).nonzero().squeeze(1)

    def line(x: Tensor) -> Tensor:
        return torch.cat([x[0, :shared], x[:, shared:].reshape(-1)[places]]).unsqueeze(0)

    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=ids.device).tril()
    sees = torch.cat([causal.new_ones(rows, longest, shared), causal & rest.unsqueeze(1)], dim=2)
    bias = torch.zeros(sees.shape, dtype=dtype, device=ids.device).masked_fill_(~sees, torch.finfo(dtype).min)
    return Line(line(ids), line(positions), line(after), shared, rows, longest, places, bias)


def before_the_last(supervised: Tensor) -> Tensor:
    """(rows, seq) bool: up to a row's last supervised position, with it; nothing after it has a part in the loss."""
    needed = supervised.flip(1).cumsum(1).flip(1) > 0
    needed[:, 0] = True  # a row is never empty
    return needed


def shared_tokens(ids: Tensor, mask: Tensor, after: Tensor) -> int:
    """How many tokens all rows begin with, as far as nothing is learned from them; never a whole row."""
    if len(ids) == 1:
        return 0
    same = ((ids == ids[0]) & mask & (after == IGNORED)).all(dim=0)
    return min(int(same.int().cumprod(0).sum()), int(mask.sum(1).min()) - 1)


@contextlib.contextmanager
def attention_by_rows(model: Any) -> Iterator[None]:
    """Have the model's attention take a `Line`, if it can; as before afterwards. Can be opened twice."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if can_pack(model):
        config._attn_implementation = WAYS.get(before, before)
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scaling: float,
    line: Line,
    fused: bool,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention in each row of a line; (1, heads, tokens, width) in, (1, tokens, heads, width) out.

    `fused` is torch's kernel; written out, it is faster for short rows on a CPU.
    """
    s = line.shared

    def as_rows(x: Tensor) -> Tensor:  # (1, heads, tokens, width) -> (heads, rows, longest, width), padded with zeros
        padded = x.new_zeros(x.shape[1], line.rows * line.longest, x.shape[3])
        return padded.index_copy(1, line.places, x[0, :, s:]).view(-1, line.rows, line.longest, x.shape[3])

    def with_shared(x: Tensor) -> Tensor:  # -> (heads, rows, shared + longest, width)
        return torch.cat([x[0, :, None, :s].expand(-1, line.rows, -1, -1), as_rows(x)], dim=2)

    of_rows = _attention(as_rows(query), with_shared(key), with_shared(value), line.bias, scaling, fused=fused)
    out = of_rows.flatten(1, 2).index_select(1, line.places)
    if s:
        q, k, v = (x[0, :, None, :s] for x in (query, key, value))  # as one row
        causal = torch.full((s, s), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device).triu(1)
        of_shared = _attention(q, k, v, causal.unsqueeze(0), scaling, fused=fused)
        out = torch.cat([of_shared.squeeze(1), out], dim=1)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, *, fused: bool) -> Tensor:
    """(heads, rows, length, width); keys and values may have fewer heads, each for a group of the queries'."""
    heads, rows, length, width = query.shape
    if fused:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        grouped = heads != key.shape[0]
        mixed = scaled_dot_product_attention(q, k, v, bias.unsqueeze(1), scale=scaling, enable_gqa=grouped)
        return mixed.transpose(0, 1)
    groups = key.shape[0]
    each = heads // groups
    # The queries of a group side by side: one product for all of them, and no copies of its keys.
    query = query.view(groups, each, rows, length, width).transpose(1, 2).reshape(groups * rows, each * length, width)
    biases = bias.unsqueeze(1).expand(-1, each, -1, -1).reshape(rows, each * length, -1).repeat(groups, 1, 1)
    scores = torch.baddbmm(biases, query, key.flatten(0, 1).transpose(1, 2), alpha=scaling)
    out = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return out.view(groups, rows, each, length, width).transpose(1, 2).reshape(heads, rows, length, width)


for plain, ours in WAYS.items():
    AttentionInterface.register(ours, partial(attend, fused=plain == "sdpa"))
    AttentionMaskInterface.register(ours, lambda *_, **__: None)
