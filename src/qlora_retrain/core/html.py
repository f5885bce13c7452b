"""Self-contained HTML pages for a person: a sentence, tables and charts, readable in dark and in light mode.

Only `Html`, which the functions of this module make, is markup; every other value is text and gets escaped. A page
loads nothing: no script, no font, no image, no link, and its own policy forbids them too. Callers pass counts, names
and hash prefixes. They pass the text of rows only where a line allows it (`text_in_reports`).
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora_retrain.core.html_style import STYLE


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One row of a forest plot: a value with its interval, and the limit that applies to it, if any."""

    name: str
    value: float
    low: float
    high: float
    limit: float | None = None


class Html(str):
    """Markup that is safe to show. Every other `str` is escaped before it enters a page."""

    __slots__ = ()


_COLOURS = 6
_MAX_WORD_LETTERS = 20  # the width of a column on a telephone
# Where a long word may be broken: after one of its separators, otherwise after _MAX_WORD_LETTERS letters.
_WORD_PIECE = re.compile(rf"[^_/.=&?:-]{{0,{_MAX_WORD_LETTERS}}}[_/.=&?:-]|[^_/.=&?:-]{{1,{_MAX_WORD_LETTERS}}}")
_NARROW_COLUMNS = 3  # the most columns that fit a telephone; a table with more of them scrolls
# Of a line chart, in SVG units: the whole drawing, then the margins around its axes.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 280, 64, 16, 12, 44


def page(title: str, sentence: str, *blocks: str) -> str:
    """Return a whole document; `sentence` is the verdict that a person reads first."""
    # Row text may be in the page: even if an escape were missed, the browser would run and load nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f'<p class="sentence">{_text(sentence)}</p>\n{_join_blocks(blocks)}\n</body>\n</html>\n'
    )


def section(heading: str, *blocks: str) -> Html:
    """Return a heading over its blocks; a plain string among them becomes a paragraph."""
    return Html(f"<section>\n<h2>{_text(heading)}</h2>\n{_join_blocks(blocks)}\n</section>")


def bullets(items: Iterable[str]) -> Html:
    """Return a list of sentences."""
    body = "".join(f"<li>{item if isinstance(item, Html) else _text(item)}</li>\n" for item in items)
    return Html(f"<ul>\n{body}</ul>")


def details(summary: str, *blocks: str) -> Html:
    """Return blocks that are shown when the reader opens them."""
    return Html(f"<details><summary>{_text(summary)}</summary>\n{_join_blocks(blocks)}\n</details>")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", stack: bool = False) -> Html:
    """Return a table; numbers are aligned right and rounded to four digits.

    Args:
        headers: The names of the columns.
        rows: The cells of each line.
        caption: A sentence above.
        stack: On a narrow screen write a line's cells below each other, each with its header, and scroll nothing.
    """
    row_list = list(rows)
    # The first row says which columns hold numbers, so that a header stands over its column.
    first = row_list[0] if row_list else ()
    is_numeric = [i < len(first) and _is_number(first[i]) for i in range(len(headers))]
    head = "".join(
        f'<th class="n">{_text(h)}</th>' if n else f"<th>{_text(h)}</th>"
        for h, n in zip(headers, is_numeric, strict=True)
    )

    labels = headers if stack else [""] * len(headers)
    body = "".join(f"<tr>{''.join(map(_cell, row, labels))}</tr>\n" for row in row_list)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    if stack:
        return Html(f'<table class="stack">{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>')
    markup = f"<table>{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return Html(f'<div class="wide">{markup}</div>' if len(headers) > _NARROW_COLUMNS else markup)


def key_value_table(mapping: Mapping[str, object]) -> Html:
    """Return a table of names and values, one pair a line; units belong in the names."""
    body = "".join(f"<tr><th>{_breakable(name)}</th>{_cell(value)}</tr>\n" for name, value in mapping.items())
    return Html(f'<table class="facts"><tbody>\n{body}</tbody></table>')


def highlight(text: str) -> Html:
    """Return a word of a table in the warning colour."""
    return Html(f'<span class="bad">{_text(text)}</span>')


def join(*parts: str) -> Html:
    """Return words and markup as one piece of markup."""
    return Html("".join(part if isinstance(part, Html) else _text(part) for part in parts))


def with_interval(value: str, interval: str) -> Html:
    """Return a number of a table with its interval on the line below, where it is never broken."""
    return Html(f'{_text(value)}<br><span class="note">{_text(interval)}</span>')


def bar_chart(
    values: Mapping[str, float],
    caption: str = "",
    notes: Mapping[str, str] | None = None,
    *,
    before: Mapping[str, float] | None = None,
    limit: float | None = None,
    out: Collection[str] = (),
    longest: float = 0.0,
) -> Html:
    """Return one horizontal bar per name; a value that is negative or not finite gets no bar.

    Args:
        values: The lengths, by name.
        caption: A sentence above.
        notes: By name, words in small letters below its bar.
        before: By name, the length of a thin second bar to compare with.
        limit: Where a dashed line crosses the bars.
        out: The names whose bars have the warning colour.
        longest: The least value of a whole bar, so that two charts have one scale.
    """
    # NaN would make every comparison false, and an infinite value would shrink all other bars to nothing.
    lengths = [*values.values(), *(before or {}).values(), *([] if limit is None else [limit])]
    longest = max([longest, *(v for v in lengths if math.isfinite(v))])

    def bar(value: float, style: str) -> str:
        percent = value / longest * 100 if longest > 0 and math.isfinite(value) and value > 0 else 0.0
        return f'<div class="bar{style}" style="width:{percent:.2f}%"></div>' if percent else ""

    limit_mark = (
        "" if limit is None or longest <= 0 else f'<i class="limit" style="left:{limit / longest * 100:.2f}%"></i>'
    )
    body = ""
    for name, value in values.items():
        bars = bar(value, " out" if name in out else "") + (bar(before.get(name, 0.0), " before") if before else "")
        body += (
            f'<tr><td>{_breakable(name)}</td>{_cell(value)}<td><div class="plot">{bars}{limit_mark}</div></td></tr>\n'
        )
        if notes and name in notes:
            body += f'<tr class="under"><td colspan="3" class="note">{_breakable(notes[name])}</td></tr>\n'
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return Html(f'<table class="bars">{title}<tbody>\n{body}</tbody></table>')


def forest_plot(rows: Sequence[ForestRow], caption: str = "") -> Html:
    """Return values with their intervals on one scale; 0 is marked by a line, a limit by a dashed tick.

    It is drawn with HTML boxes and not as SVG, so that the names wrap on a narrow screen.
    """
    finite = [x for row in rows for x in (row.low, row.high, row.limit) if x is not None and math.isfinite(x)]
    if not finite:
        return Html(f"<p>{_text(caption)}: nothing was measured.</p>")

    # The scale always holds 0, and a margin of 4 % on either side keeps the outermost points inside.
    low, high = min(0.0, *finite), max(0.0, *finite)
    margin = (high - low or 1.0) * 0.04
    low, high = low - margin, high + margin

    def place(x: float) -> str:
        return f"{(x - low) / (high - low) * 100:.2f}%"

    body = ""
    for row in rows:
        parts = f'<i class="zero" style="left:{place(0.0)}"></i>'
        if math.isfinite(row.low + row.high):
            right = f"{(high - row.high) / (high - low) * 100:.2f}%"
            parts += f'<i class="range" style="left:{place(row.low)};right:{right}"></i>'
        if math.isfinite(row.value):
            parts += f'<i class="point" style="left:{place(row.value)}"></i>'
        if row.limit is not None:
            parts += f'<i class="limit" style="left:{place(row.limit)}"></i>'

        # The numbers are also the label for a screen reader, which sees nothing of the boxes.
        limit = "" if row.limit is None else f", limit {_number(row.limit)}"
        note = f"{row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f}){limit}"
        body += f'<tr><td>{_breakable(row.name)}<br><span class="note">{_text(note)}</span></td>'
        body += f'<td><div class="forest" role="img" aria-label="{_text(note)}">{parts}</div></td></tr>\n'

    ends = f'<span class="note">{_number(low)}</span><span class="note">{_number(high)}</span>'
    foot = f'<tr><td></td><td><div class="scale">{ends}</div></td></tr>'
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return Html(f'<table class="marks">{title}<tbody>\n{body}{foot}</tbody></table>')


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Html:
    """Return lines on one pair of axes as SVG, in at most six colours; points that are not finite are left out."""
    lines = {name: [(x, y) for x, y in points if math.isfinite(x + y)] for name, points in series.items()}
    all_points = [point for points in lines.values() for point in points]
    if not all_points:
        return Html(f"<p>{_text(y_label)}: nothing was measured.</p>")
    x_ticks, y_ticks = axis_ticks([x for x, _ in all_points]), axis_ticks([y for _, y in all_points])

    def place(x: float, y: float) -> tuple[float, float]:
        """Return a point's place in the drawing, whose y axis points down."""
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        return _LEFT + across * (right - _LEFT), bottom - up * (bottom - _TOP)

    # The axes: a grid line and a number at every tick of y, a number at every tick of x.
    parts = []
    for tick_value in y_ticks:
        x, y = place(x_ticks[0], tick_value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick_value:.6g}</text>')
    for tick_value in x_ticks:
        x, y = place(tick_value, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick_value:.6g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{_text(x_label)}</text>')

    legend = ""
    for i, (name, points) in enumerate(lines.items()):
        colour = f"var(--s{i % _COLOURS})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        # A line of one point has no length and would not be seen.
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        legend += f'<span class="key"><i style="border-color:{colour}"></i> {_text(name)}</span>'

    label = f"{_text(y_label)} over {_text(x_label)}"
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Html(f"<figure><figcaption>{_text(y_label)} {legend}</figcaption>\n{drawing}</figure>")


def _text(value: object) -> str:
    """Return the value as escaped text."""
    # What is not printable (controls, lone surrogates, characters that reverse the reading order) is shown as its code.
    printable = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in str(value))
    return html.escape(printable, quote=True)


def _breakable(value: object) -> str:
    """Return text for a narrow column: a long word (a label, a path) may be broken after its separators."""
    # With a group in its pattern, split returns the long words too, at the odd places.
    words = re.split(rf"(\S{{{_MAX_WORD_LETTERS + 1},}})", str(value))
    return "".join("<wbr>".join(map(_text, _WORD_PIECE.findall(w))) if i % 2 else _text(w) for i, w in enumerate(words))


def _join_blocks(blocks: Iterable[str]) -> str:
    return "\n".join(b if isinstance(b, Html) else f"<p>{_text(b)}</p>" for b in blocks)


def _cell(value: object, label: str = "") -> str:
    name = f' data-label="{_text(label)}"' if label else ""
    if isinstance(value, Html):
        return f"<td{name}>{value}</td>"
    # Before the numbers: in Python True is an int.
    if isinstance(value, bool) or value is None:
        return f"<td{name}>{'-' if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float)):
        return f'<td class="n"{name}>{_number(value)}</td>'
    return f"<td{name}>{_breakable(value)}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def axis_ticks(values: Sequence[float]) -> list[float]:
    """Return about five round numbers that enclose the values; the first and the last are the axis's ends."""
    low, high = min(values), max(values)
    if high == low:  # an axis needs a length
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2

    # The next of 1, 2, 5, 10 times a power of ten; 1e-9 forgives the rounding of the division.
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]
