"""Compute what `torch.nn.attention.varlen.varlen_attn` promises, in plain loops over segments and heads, on any device.

It also refuses what the real kernels refuse, so that a test on a CPU finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Return (T_q, H, D): softmax attention within each segment, aligned at the last query and the last key."""
    refuse_what_the_kernels_refuse(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=enable_gqa)
    assert scale is not None
    left, right = window_size
    group = query.shape[1] // key.shape[1]

    outputs = []
    for begin_q, end_q, begin_k, end_k in zip(
        cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), cu_seq_k[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True
    ):
        num_q, num_k = end_q - begin_q, end_k - begin_k
        is_visible = torch.ones(num_q, num_k, dtype=torch.bool, device=query.device)
        for i in range(num_q):
            own_key = i + num_k - num_q
            for j in range(num_k):
                is_visible[i, j] = (left < 0 or j >= own_key - left) and (right < 0 or j <= own_key + right)

        heads = []
        for head in range(query.shape[1]):
            q = query[begin_q:end_q, head].double()
            k, v = (x[begin_k:end_k, head // group].double() for x in (key, value))
            scores = (q @ k.T * scale).masked_fill(~is_visible, -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs).to(query.dtype)


def refuse_what_the_kernels_refuse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    enable_gqa: bool,
) -> None:
    """Check shapes, types and lengths."""
    for x in (query, key, value):
        assert x.stride(-1) == 1
        assert x.shape[-1] == query.shape[-1] <= 256
        assert x.shape[-1] % 8 == 0
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    for x, cu_seq, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
        assert cu_seq.dtype == torch.int32
        lens = cu_seq.diff()
        assert (int(cu_seq[0]), int(cu_seq[-1])) == (0, len(x))
        assert (int(lens.min()) > 0, int(lens.max())) == (True, longest)
