"""Choose for each block of 64 weights a constant to subtract, so that its NF4 codes carry the most information.

This is the information calibration of IR-QLoRA (Qin et al., arXiv 2402.05445, sec. 3.2). NF4 expects weights around 0;
a block around another number leaves levels unused. Of the numbers near the block's median, the one is taken for which
the entropy of the block's 16 codes is greatest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlora_retrain.lm.four_bit import BLOCK_SIZE, bounds_and_codes

if TYPE_CHECKING:
    from torch import Tensor

# NF4's outermost level, 1, is this quantile of a standard normal. So a block whose largest number is 1 is expected to
# have the deviation 1 / 1.848: what the search range is a fraction of.
_DEVIATION = 0.541087
RANGE = 0.1  # of that deviation, to both sides of the median (the paper's lambda)
STEPS = 100  # of the search to either side (the paper's n)
_BLOCKS_PER_CHUNK = 128  # a temporary of 16 counts of 201 constants has 2 to 4 MB
_ENTROPY_DIGITS = 2**20  # entropies are compared as whole numbers, so that equal ones are equal


def choose_shifts(weights: Tensor) -> Tensor:
    """Return the constant (ceil(weights / 64),) of each block of a flat tensor, in fp32, on the tensor's device.

    Of equal entropies the constant nearest to the median is taken. An incomplete last block is filled with its last
    weight for the choice. A million weights take a second on one core of a CPU.
    """
    import torch
    from torch.nn.functional import pad

    missing = -weights.numel() % BLOCK_SIZE
    blocks = pad(weights.view(1, -1), (0, missing), mode="replicate") if missing else weights
    bounds = torch.from_numpy(bounds_and_codes("nf4")[0]).to(weights.device)
    candidates = torch.arange(-STEPS, STEPS + 1, device=weights.device)
    candidates = candidates[candidates.abs().argsort(stable=True)] * (RANGE * _DEVIATION / STEPS)
    surprise = _surprise_by_count().to(weights.device)

    parts = blocks.view(-1, BLOCK_SIZE).split(_BLOCKS_PER_CHUNK)
    return torch.cat([_shifts_of_chunk(part.float(), candidates, bounds, surprise) for part in parts])


def entropy_bits(codes: Tensor) -> Tensor:
    """Return the entropy (N,), in bits, of the 4-bit codes of each of N blocks (N, block)."""
    import torch

    counts = torch.stack([(codes == code).sum(1) for code in range(16)], 1)
    shares = counts / codes.shape[1]
    return -(shares * shares.clamp_min(torch.finfo(torch.float32).tiny).log2()).sum(1)


def _shifts_of_chunk(blocks: Tensor, candidates: Tensor, bounds: Tensor, surprise: Tensor) -> Tensor:
    """Return the best constant (N,) of blocks (N, 64), of these candidates as fractions of the largest distance."""
    import torch

    ascending = blocks.sort(1).values
    least, median, largest = ascending[:, 0], ascending[:, BLOCK_SIZE // 2 - 1], ascending[:, -1]
    distance = torch.maximum(largest - median, median - least)
    shifts = torch.addcmul(median[:, None], distance[:, None], candidates)  # (N, candidates)
    scales = torch.maximum(largest[:, None] - shifts, shifts - least[:, None])

    # A code is the number of bounds below a weight. In ascending order the weights of a code are neighbours, so their
    # number is the difference of two positions: 15 searches for a candidate, and not 64 weights x 15 comparisons.
    limits = torch.addcmul(shifts[:, :, None], scales[:, :, None], bounds)  # (N, candidates, 15)
    positions = torch.searchsorted(ascending, limits.flatten(1), right=True, out_int32=True).view(limits.shape)
    ends = torch.nn.functional.pad(positions, (1, 0))
    starts_of_next = torch.nn.functional.pad(positions, (0, 1), value=BLOCK_SIZE)
    entropies = surprise[starts_of_next - ends].sum(2)  # (N, candidates)
    return shifts.gather(1, entropies.argmax(1, keepdim=True))[:, 0]


def _surprise_by_count() -> Tensor:
    """Return -p log2 p of every number of weights that may have one code, as whole numbers."""
    import torch

    shares = [count / BLOCK_SIZE for count in range(BLOCK_SIZE + 1)]
    return torch.tensor([round(-_ENTROPY_DIGITS * p * math.log2(p)) if p else 0 for p in shares])
