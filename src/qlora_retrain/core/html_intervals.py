"""A chart of values with their intervals, one after the other, beside a second value to compare each with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_retrain.core.html import Html, axis_ticks, join

# In SVG units: the whole drawing, then the margins around its axes.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 300, 64, 24, 36, 32
_MAX_LABELS = 8
# How far the second value stands beside the first, so that neither hides the other.
_SHIFT = 7


@dataclass(frozen=True, slots=True)
class IntervalValue:
    """A value with the ends of its interval; without ends it is measured as a point alone."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def numbers(self) -> list[float]:
        """The finite numbers among value and ends."""
        return [x for x in (self.value, self.low, self.high) if x is not None and math.isfinite(x)]

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" ({self.low:.6g} to {self.high:.6g})"
        return f"{self.value:.6g}{ends}"


@dataclass(frozen=True, slots=True)
class IntervalPoint:
    """One place on the horizontal axis.

    Attributes:
        label: What stands below the axis.
        name: What a pointer over the point shows.
        value: The value.
        beside: The value to compare it with.
    """

    label: str
    name: str
    value: IntervalValue | None
    beside: IntervalValue | None = None


def interval_chart(points: Sequence[IntervalPoint], y_label: str, legend: tuple[str, str]) -> Html:
    """Return the values as SVG, without a style attribute, so that a page may forbid those.

    Args:
        points: The places, from left to right.
        y_label: What is measured.
        legend: What the values are, and what stands beside them.
    """
    measured = [item for point in points for item in (point.value, point.beside) if item and math.isfinite(item.value)]
    if not measured:
        return Html(f"<p>{join(y_label)}: nothing was measured.</p>")
    ticks = axis_ticks([number for item in measured for number in item.numbers])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def height(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - _TOP)

    parts = []
    for number in ticks:
        y = height(number)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number:.6g}</text>')

    every = math.ceil(len(points) / _MAX_LABELS)
    for i, point in enumerate(points):
        x = _LEFT + (i + 0.5) / len(points) * (right - _LEFT)
        # Counted from the right, so that the newest place has its label.
        if (len(points) - 1 - i) % every == 0:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{join(point.label)}</text>')
        for item, colour, place in ((point.beside, "var(--s1)", x + _SHIFT), (point.value, "var(--s0)", x)):
            if item and math.isfinite(item.value):
                parts.append(_mark(item, colour, place, height, f"{point.name}: {item}"))

    parts += _legend(legend)
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{join(y_label)}">{"".join(parts)}</svg>'
    return Html(f"<figure><figcaption>{join(y_label)}</figcaption>\n{drawing}</figure>")


def _mark(item: IntervalValue, colour: str, x: float, place: Callable[[float], float], title: str) -> str:
    line = ""
    if item.low is not None and item.high is not None and math.isfinite(item.low + item.high):
        ends = f'y1="{place(item.low):.1f}" x2="{x:.1f}" y2="{place(item.high):.1f}"'
        line = f'<line x1="{x:.1f}" {ends} stroke="{colour}" stroke-width="2"/>'
    circle = f'<circle cx="{x:.1f}" cy="{place(item.value):.1f}" r="4" fill="{colour}"/>'
    return f"<g><title>{join(title)}</title>{line}{circle}</g>"


def _legend(texts: tuple[str, str]) -> list[str]:
    """Return a point and a text for each, above the axes and one beside the other."""
    parts = []
    for i, (text, colour) in enumerate(zip(texts, ("var(--s0)", "var(--s1)"), strict=True)):
        x = _LEFT + i * (_WIDTH - _LEFT) // 2
        parts.append(
            f'<circle cx="{x + 4}" cy="14" r="4" fill="{colour}"/><text x="{x + 14}" y="18">{join(text)}</text>'
        )
    return parts
