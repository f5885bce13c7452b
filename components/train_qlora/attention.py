"""The ways to compute causal attention over packed rows.

`packing` lays out the rows of a micro-batch as one sequence of T tokens, with their shared prefix only once. A backend
computes attention over it: `eager` and `sdpa` in padded rows (`padded_rows`), and `varlen` by the flash kernels of an
NVIDIA GPU, where it takes the place of `sdpa`. The letters in shapes are those of `padded_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from components.train_qlora import varlen
from components.train_qlora.padded_rows import RowLayout, SharedPrefixAttention, rows_fit


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


BACKENDS = {
    "eager": Backend(partial(RowLayout.from_mask, use_sdpa=False), SharedPrefixAttention.apply, rows_fit),
    "sdpa": Backend(partial(RowLayout.from_mask, use_sdpa=True), SharedPrefixAttention.apply, rows_fit),
    "varlen": Backend(varlen.VarlenLayout.from_mask, varlen.attend, varlen.fits, has_windows=True),
}
