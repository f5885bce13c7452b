"""How many optimizer steps the learning rate rises."""

from __future__ import annotations

import math

DEFAULT_WARMUP_RATIO = 0.03


def num_warmup_steps(total_steps: int, *, steps: int | None, ratio: float | None) -> int:
    """Return the number of steps in which the rate rises, of `total_steps`.

    Args:
        total_steps: The optimizer steps of the whole run.
        steps: The number itself, where it is set.
        ratio: The fraction of the steps otherwise; None: `DEFAULT_WARMUP_RATIO`.
    """
    if steps is not None:
        return steps
    return math.ceil(total_steps * (DEFAULT_WARMUP_RATIO if ratio is None else ratio))
