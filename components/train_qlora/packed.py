"""The hot path, second half: the rows of a batch as one line of tokens, without padding and what they begin with once.

    [what all rows begin with] [rest of row 1] [rest of row 2] ...        (1, tokens)

Every layer but attention treats tokens one by one, so none of them sees padding; the beginning that a chat template
gives all rows (the system turn) costs as much as one row's, and what follows the last position that predicts a
supervised token costs nothing. In attention (`attention`) each row sees the beginning and itself, at the
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
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from components.train_qlora.attention import ByRows, Grid
from components.train_qlora.rows import IGNORED, Batch

WAYS = {"eager": "rows_eager", "sdpa": "rows_sdpa"}  # transformers' names for attention, and ours for it by rows
OWN_WAYS = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")  # attention that is not plain causal
# Lines have a multiple of so many tokens, and attention's rows of so many: a library of matrix products makes a kernel
# for every size that it meets, and keeps it (oneDNN: 20 MB for the products of a layer).
TOKENS, WIDTH = 16, 8


@dataclass(frozen=True, slots=True)
class Line:
    """A batch as one line of tokens, and how attention finds its rows again.

    Attributes:
        input_ids: (1, tokens)
        position_ids: (1, tokens), in each token's own row
        labels: (1, tokens), the label of the next token; `IGNORED` where nothing is learned
        shared: tokens that all rows begin with
        grid: the rows
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    shared: int
    grid: Grid


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
    after = pad(labels[:, 1:], (0, 1), value=IGNORED)  # what each position is to predict
    mask = batch["attention_mask"].bool() & before_the_last(after != IGNORED)
    shared = shared_tokens(ids, mask, after)
    rest = rounded(mask[:, shared:], shared)
    rows, width = rest.shape
    last = ids.shape[1] - 1
    ids, after = (pad(x, (0, max(0, shared + width - last - 1)), value=IGNORED) for x in (ids, after))
    positions = torch.arange(shared + width, device=ids.device).clamp(max=last).expand(rows, -1)

    def line(x: Tensor) -> Tensor:
        return torch.cat([x[0, :shared], x[:, shared : shared + width][rest]]).unsqueeze(0)

    return Line(line(ids).clamp(min=0), line(positions), line(after), shared, Grid.of(rest, shared, dtype))


def passes(batch: Batch, rows: int, *, packs: bool) -> int:
    """How many passes a batch is cut into, so that none computes more tokens than `rows` rows of it with padding.

    Attention does pad, to the longest row of a pass: one that has many short rows beside a long one is cut further, so
    that attention's places are at most twice those of the padded rows.
    """
    ids, n = batch["input_ids"], len(batch["input_ids"])
    if not packs:
        return -(-n // rows)
    after = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    mask = batch["attention_mask"].bool() & before_the_last(after != IGNORED)
    shared, tokens = shared_tokens(ids, mask, after), mask.sum(1)
    own, padded = (tokens - shared).tolist(), rows * int(tokens.max())

    def fits(some: list[int]) -> bool:
        return sum(some) <= padded - shared and len(some) * max(some, default=0) <= 2 * padded

    first = max(1, sum(own) // max(padded - shared, 1))
    return next(c for c in range(first, n + 1) if all(fits(own[i * n // c : (i + 1) * n // c]) for i in range(c)))


def cut(batch: Batch, count: int) -> list[Batch]:
    """The batch in so many parts; where it has fewer rows, some are of a row from which nothing is learnt."""
    n = len(batch["input_ids"])
    parts = [{k: v[i * n // count : (i + 1) * n // count] for k, v in batch.items()} for i in range(count)]
    nothing = {k: v[:1] for k, v in batch.items()} | {"labels": torch.full_like(batch["labels"][:1], IGNORED)}
    return [part if len(part["input_ids"]) else nothing for part in parts]


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


def rounded(rest: Tensor, shared: int) -> Tensor:
    """(rows, width) bool: a little more of the shortest rows, so that the line has a multiple of `TOKENS` tokens.

    What is added follows all that its row needs, so nothing looks at it.
    """
    rows, count = len(rest), int(rest.sum())
    spare = -(shared + count) % TOKENS
    width = max(int(rest.any(0).sum()), -(-(count + spare) // rows))
    width = -(-width // WIDTH) * WIDTH
    by_column = pad(rest, (0, max(0, width - rest.shape[1])))[:, :width].T.contiguous()
    by_column.view(-1)[(~by_column).view(-1).nonzero()[:spare, 0]] = True
    return by_column.T


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
    # Where weights are wider than what is computed in, rotated queries and keys may be wider than values.
    three = (x[0].transpose(0, 1).to(line.grid.bias.dtype) for x in (query, key, value))
    found: Tensor = ByRows.apply(*three, line.grid, scaling, fused)
    return found.unsqueeze(0), None


for plain, ours in WAYS.items():
    AttentionInterface.register(ours, partial(attend, fused=plain == "sdpa"))
    AttentionMaskInterface.register(ours, lambda *_, **__: None)
