"""Self-contained HTML pages for a person: a sentence, tables and charts, readable in dark and in light.

Whatever is not `Html` (made by a function of this module) is text and gets escaped. A page loads nothing: no script, no
font, no image, no link; its own policy forbids them too. Callers pass counts, names and hash prefixes; row text only
where a line allows it in so many words.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a forest plot: a value with its interval, and the limit that it is held against, if any."""

    name: str
    value: float
    low: float
    high: float
    limit: float | None = None


class Html(str):
    """Markup that this module made; every other `str` is escaped before it enters a page."""

    __slots__ = ()


_STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#59636e;--line:#d1d9e0;--back:#fff;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b5578f;--s4:#a87400;--s5:#3f8fc0}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--line:#3d444d;--back:#0d1117;
--s0:#56b4e9;--s1:#ff8c42;--s2:#2cc79a;--s3:#e49bc4;--s4:#e6b422;--s5:#8fc7ff}}
body{max-width:76rem;margin:2rem auto;padding:0 1rem;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}.sentence{font-size:1.1rem;font-weight:600}
table{border-collapse:collapse;margin:.8rem 0;width:100%}caption{text-align:left;color:var(--soft)}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:break-word}th{color:var(--soft);font-weight:600}.bad{color:var(--s1);font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
p,table,figure{max-width:60rem}.wide table{max-width:none}.wide{overflow-x:auto}
.wide .told{white-space:nowrap}@media(max-width:40rem){.wide table{min-width:38rem}}
.wide tr>:first-child{position:sticky;left:0;background:var(--back)}
.facts{width:auto}.facts th{min-width:6rem}.facts td{white-space:pre-line}
.bars td:last-child{width:60%}.bar{height:.8rem;background:var(--s0);min-width:1px}
.marks td:last-child{width:58%}.told{color:var(--soft);font-size:.85rem}
.forest{position:relative;height:1.1rem;margin-top:.25rem}.forest i{position:absolute;top:0;bottom:0}
.forest .zero{border-left:1px solid var(--soft)}.forest .range{top:.5rem;bottom:auto;height:2px;background:var(--s0)}
.forest .point{top:.3rem;width:.5rem;height:.5rem;margin-left:-.25rem;border-radius:50%;background:var(--s0)}
.forest .limit{border-left:2px dashed var(--s1)}.scale{display:flex;justify-content:space-between}
svg{width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,sans-serif}.grid{stroke:var(--line)}
.key{margin-right:1.2rem;white-space:nowrap}.key i{display:inline-block;width:1.4rem;border-top:3px solid}
"""
_COLOURS = 6
_WORD = 20  # letters of a word that a telephone's column holds
_PIECE = re.compile(rf"[^_/.=&?:-]{{0,{_WORD}}}[_/.=&?:-]|[^_/.=&?:-]{{1,{_WORD}}}")
_NARROW = 3  # columns that fit a telephone; more of them scroll
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 280, 64, 16, 12, 44


def page(title: str, sentence: str, *blocks: str) -> str:
    """A whole document; `sentence` is the verdict that a person reads first."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f'<p class="sentence">{_text(sentence)}</p>\n{_joined(blocks)}\n</body>\n</html>\n'
    )


def section(heading: str, *blocks: str) -> Html:
    """A heading over its blocks; a plain string among them becomes a paragraph."""
    return Html(f"<section>\n<h2>{_text(heading)}</h2>\n{_joined(blocks)}\n</section>")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """A table; numbers are aligned right and rounded to four digits."""
    listed = list(rows)
    first = listed[0] if listed else ()
    right = [i < len(first) and _is_number(first[i]) for i in range(len(headers))]
    head = "".join(
        f'<th class="n">{_text(h)}</th>' if n else f"<th>{_text(h)}</th>" for h, n in zip(headers, right, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cell(c) for c in row)}</tr>\n" for row in listed)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    found = f"<table>{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return Html(f'<div class="wide">{found}</div>' if len(headers) > _NARROW else found)


def numbers(mapping: Mapping[str, object]) -> Html:
    """Names and their values, one a line; units belong in the names."""
    body = "".join(f"<tr><th>{_text(name)}</th>{_cell(value)}</tr>\n" for name, value in mapping.items())
    return Html(f'<table class="facts"><tbody>\n{body}</tbody></table>')


def bad(text: str) -> Html:
    """A word of a table that must catch the eye."""
    return Html(f'<span class="bad">{_text(text)}</span>')


def with_ends(value: str, ends: str) -> Html:
    """A number of a table with its interval below it, which is never broken."""
    return Html(f'{_text(value)}<br><span class="told">{_text(ends)}</span>')


def bar_chart(values: Mapping[str, float], caption: str = "") -> Html:
    """A horizontal bar a name; what is negative or not finite gets none."""
    most = max((v for v in values.values() if math.isfinite(v)), default=0.0)
    body = ""
    for name, value in values.items():
        share = value / most * 100 if most > 0 and math.isfinite(value) and value > 0 else 0.0
        bar = f'<div class="bar" style="width:{share:.2f}%"></div>' if share else ""
        body += f"<tr><td>{_breakable(name)}</td>{_cell(value)}<td>{bar}</td></tr>\n"
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return Html(f'<table class="bars">{title}<tbody>\n{body}</tbody></table>')


def forest_plot(marks: Sequence[Mark], caption: str = "") -> Html:
    """Values with their intervals under one scale, 0 marked by a line and a limit by a tick; no more than names fit."""
    seen = [x for m in marks for x in (m.low, m.high, m.limit) if x is not None and math.isfinite(x)]
    if not seen:
        return Html(f"<p>{_text(caption)}: nothing was measured.</p>")
    low, high = min(0.0, *seen), max(0.0, *seen)
    margin = (high - low or 1.0) * 0.04
    low, high = low - margin, high + margin

    def place(x: float) -> str:
        return f"{(x - low) / (high - low) * 100:.2f}%"

    body = ""
    for m in marks:
        parts = f'<i class="zero" style="left:{place(0.0)}"></i>'
        if math.isfinite(m.low + m.high):
            parts += (
                f'<i class="range" style="left:{place(m.low)};right:{(high - m.high) / (high - low) * 100:.2f}%"></i>'
            )
        if math.isfinite(m.value):
            parts += f'<i class="point" style="left:{place(m.value)}"></i>'
        if m.limit is not None:
            parts += f'<i class="limit" style="left:{place(m.limit)}"></i>'
        limit = "" if m.limit is None else f", limit {_number(m.limit)}"
        told = f"{m.value:+.3f} ({m.low:+.3f} to {m.high:+.3f}){limit}"
        body += f'<tr><td>{_breakable(m.name)}<br><span class="told">{_text(told)}</span></td>'
        body += f'<td><div class="forest" role="img" aria-label="{_text(told)}">{parts}</div></td></tr>\n'
    ends = f'<span class="told">{_number(low)}</span><span class="told">{_number(high)}</span>'
    foot = f'<tr><td></td><td><div class="scale">{ends}</div></td></tr>'
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return Html(f'<table class="marks">{title}<tbody>\n{body}{foot}</tbody></table>')


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Html:
    """Lines over one pair of axes, at most six colours; points that are not finite are left out."""
    lines = {name: [(x, y) for x, y in points if math.isfinite(x + y)] for name, points in series.items()}
    seen = [point for points in lines.values() for point in points]
    if not seen:
        return Html(f"<p>{_text(y_label)}: nothing was measured.</p>")
    x_ticks, y_ticks = _ticks([x for x, _ in seen]), _ticks([y for _, y in seen])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        return _LEFT + across * (right - _LEFT), bottom - up * (bottom - _TOP)

    parts = []
    for tick in y_ticks:
        x, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{_text(x_label)}</text>')
    keys = ""
    for i, (name, points) in enumerate(lines.items()):
        colour = f"var(--s{i % _COLOURS})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        keys += f'<span class="key"><i style="border-color:{colour}"></i> {_text(name)}</span>'
    label = f"{_text(y_label)} over {_text(x_label)}"
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Html(f"<figure><figcaption>{_text(y_label)} {keys}</figcaption>\n{drawing}</figure>")


def _text(value: object) -> str:
    # What is not printable (controls, lone surrogates, characters that reverse the reading order) is shown as its code.
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in str(value))
    return html.escape(shown, quote=True)


def _breakable(value: object) -> str:
    """Text for a narrow column: a long word (a label, a path) may be broken after its marks, or where it must."""
    words = re.split(rf"(\S{{{_WORD + 1},}})", str(value))  # every second one is long
    return "".join("<wbr>".join(map(_text, _PIECE.findall(w))) if i % 2 else _text(w) for i, w in enumerate(words))


def _joined(blocks: Iterable[str]) -> str:
    return "\n".join(b if isinstance(b, Html) else f"<p>{_text(b)}</p>" for b in blocks)


def _cell(value: object) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    if isinstance(value, bool) or value is None:
        return f"<td>{'-' if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float)):
        return f'<td class="n">{_number(value)}</td>'
    return f"<td>{_breakable(value)}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that enclose the values, the first and the last being the axis's ends."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]
