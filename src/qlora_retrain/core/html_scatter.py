"""A scatter plot for the pages of `html`: points on one pair of axes, some of them joined by a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_retrain.core.html import Html, axis_ticks, join

# In SVG units: the whole drawing, then the margins around its axes.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 320, 64, 24, 22, 44
_LABEL_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class ScatterPoint:
    """A point with its name; those on the line are joined from left to right, with their names beside them."""

    name: str
    x: float
    y: float
    is_on_line: bool = False


def scatter_chart(points: Sequence[ScatterPoint], x_label: str, y_label: str, caption: str = "") -> Html:
    """Return the points as SVG; points that are not finite are left out."""
    points = [point for point in points if math.isfinite(point.x + point.y)]
    if not points:
        return Html(f"<p>{join(y_label)}: nothing was measured.</p>")
    x_ticks, y_ticks = axis_ticks([p.x for p in points]), axis_ticks([p.y for p in points])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = _share(x, x_ticks), _share(y, y_ticks)
        return _LEFT + across * (right - _LEFT), bottom - up * (bottom - _TOP)

    parts = []
    for value in y_ticks:
        x, y = place(x_ticks[0], value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in x_ticks:
        x, y = place(value, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:.6g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{join(x_label)}</text>')

    line = sorted((point for point in points if point.is_on_line), key=lambda point: (point.x, point.y))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point.x, point.y) for point in line))
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--s0)" stroke-width="2"/>')
    for point in points:
        x, y = place(point.x, point.y)
        colour = "var(--s0)" if point.is_on_line else "var(--s1)"
        title = f"<title>{join(f'{point.name}: {point.x:.6g}, {point.y:.6g}')}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>')
        if point.is_on_line:
            # On the side where there is room.
            anchor, shift = ("end", -7) if x > _WIDTH / 2 else ("start", 7)
            text = join(point.name[:_LABEL_CHARACTERS])
            parts.append(f'<text x="{x + shift:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">{text}</text>')

    label = join(f"{y_label} over {x_label}")
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Html(f"<figure><figcaption>{join(caption or y_label)}</figcaption>\n{drawing}</figure>")


def _share(value: float, ticks: Sequence[float]) -> float:
    """Return how far along the axis a value is, from 0 to 1."""
    return (value - ticks[0]) / (ticks[-1] - ticks[0])
