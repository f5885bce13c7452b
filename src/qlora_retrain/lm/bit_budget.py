"""Choose which linear layers get 8 bits and which 4, for the least total squared error within a budget of bits.

Two choices a layer make this a knapsack: a layer's value is the squared error that 8 bits avoid, and its size the
number of its weights. The widths of a model have a large common divisor, so the table of all sums is small, and the
choice is the best one. LQ-LoRA (arXiv 2311.12023, sec. 3.3) solves the same with more choices, as an integer program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAX_UNITS = 50_000  # of the table; beyond it sizes are rounded up to a unit, so that the budget holds all the same


def choose_layers(sizes: Sequence[int], avoided_errors: Sequence[float], capacity: int) -> list[bool]:
    """Return for each layer whether it is among those that avoid the most error and have at most `capacity` weights.

    Args:
        sizes: The number of weights of each layer.
        avoided_errors: The squared error of each layer in 4 bits less that in 8 bits.
        capacity: The weights for which the budget has 8 bits.
    """
    import numpy as np

    capacity = min(capacity, sum(sizes))
    unit = max(math.gcd(*sizes), -(-capacity // _MAX_UNITS), 1)
    units = [-(-size // unit) for size in sizes]

    # best[c]: the most error that the layers so far avoid within c units.
    best = np.zeros(capacity // unit + 1)
    is_taken: NDArray[np.bool_] = np.zeros((len(sizes), len(best)), np.bool_)
    for i, (size, avoided) in enumerate(zip(units, avoided_errors, strict=True)):
        if size < len(best):
            with_layer = best[: len(best) - size] + avoided
            is_taken[i, size:] = with_layer > best[size:]
            best[size:] = np.maximum(best[size:], with_layer)

    choice, remaining = [False] * len(sizes), len(best) - 1
    for i in reversed(range(len(sizes))):
        if is_taken[i, remaining]:
            choice[i], remaining = True, remaining - units[i]
    return choice
