"""Count rows by their length in tokens, and draw the counts beside the limit.

The bars' widths grow with the length, four to a doubling, so that the limit and the longest rows are always in view.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from qlora_retrain.core.html import Html

BARS_PER_DOUBLING = 4
_MAX_TICKS = 5  # labels of the axis that fit a telephone


def count_lengths(lengths: Iterable[int], limit: int) -> dict[str, int]:
    """Count the lengths by range, from the first range that has any to the last one; a range ends at the limit."""
    counts_by_length = Counter(length for length in lengths if length > 0)
    if not counts_by_length:
        return {}
    num_doublings = max(counts_by_length).bit_length()
    edges = {math.ceil(2 ** (k / BARS_PER_DOUBLING)) for k in range(BARS_PER_DOUBLING * num_doublings + 1)}
    starts = sorted(edges | {limit + 1, max(edges) * 2})

    counts: Counter[int] = Counter()
    for length, count in counts_by_length.items():
        counts[bisect.bisect_right(starts, length) - 1] += count
    return {f"{starts[i]}-{starts[i + 1] - 1}": counts[i] for i in range(min(counts), max(counts) + 1)}


def plot_lengths(histogram: Mapping[str, int], limit: int) -> Html:
    """Return the histogram as bars over a logarithmic axis, with a dashed line at the limit; in HTML boxes."""
    ranges = [(*map(int, name.split("-")), count) for name, count in histogram.items()]
    if not ranges:
        return Html("<p>No row has a length.</p>")
    low = math.floor(math.log2(ranges[0][0]))
    high = math.ceil(math.log2(max(ranges[-1][1], limit * 1.2)))

    def place(tokens: float) -> float:
        return (math.log2(tokens) - low) / (high - low) * 100

    # The areas are the numbers of rows, since the ranges beside the limit are narrower than the others.
    heights = [count / (place(last + 1) - place(first)) for first, last, count in ranges]

    parts = ""
    for (first, last, count), height in zip(ranges, heights, strict=True):
        if count:
            colour = "var(--s1)" if first > limit else "var(--s0)"
            left, right = place(first), place(last + 1)
            parts += (
                f'<i title="{count:,} chats of {first:,} to {last:,} tokens" style="position:absolute;bottom:0;'
                f"left:{left:.2f}%;width:calc({right - left:.2f}% - 1px);height:{height / max(heights) * 100:.2f}%;"
                f'min-height:2px;background:{colour}"></i>'
            )
    parts += (
        '<i style="position:absolute;top:0;bottom:0;border-left:2px dashed var(--s1);'
        f'left:{place(limit):.2f}%"></i><span class="note" style="position:absolute;top:0;'
        f'right:{100 - place(limit):.2f}%;padding-right:.4rem;color:var(--s1)">limit {limit:,}</span>'
    )

    step = -(-(high - low) // _MAX_TICKS)
    ticks = "".join(
        f'<span class="note" style="position:absolute;left:{place(2**k):.2f}%;white-space:nowrap;'
        f'transform:translateX({"0" if k == low else "-100%" if k == high else "-50%"})">{2**k:,}</span>'
        for k in range(low, high + 1, step)
    )
    label = f"chats by length, {ranges[0][0]:,} to {ranges[-1][1]:,} tokens, limit {limit:,}"
    return Html(
        f'<figure style="margin:.8rem 0" role="img" aria-label="{label}">'
        f'<div style="position:relative;height:10rem;border-bottom:1px solid var(--line)">{parts}</div>'
        f'<div style="position:relative;height:1.5rem">{ticks}</div>'
        '<figcaption class="note">tokens of a chat; the axis doubles from mark to mark</figcaption></figure>'
    )
