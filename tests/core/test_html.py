"""Reports are text for a person: nothing that is passed in runs, and nothing is loaded from anywhere."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from qlora_retrain.core import html as report
from qlora_retrain.core.html_scatter import ScatterPoint, scatter_chart

EVIL = "<script>alert('x')</script>\"'><img src=https://evil.example/x onerror=alert(1)>"
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """What a browser would see: tags, attributes and visible text; fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(document: str) -> Outline:
    parser = Outline()
    parser.feed(document)
    parser.close()
    assert parser._open == []
    return parser


def everything(text: str) -> str:
    """Return a page that has the text in every position where a caller can put text."""
    return report.page(
        text,
        text,
        text,
        report.section(text, text, report.table([text, text], [[text, 1], [None, text]], text)),
        report.key_value_table({text: text, "b": 2.5}),
        report.bar_chart({text: 3.0, "two": 1.0}, text),
        report.line_chart({text: [(0, 1), (1, 2)], "y": [(0, 2)]}, text, text),
        report.line_chart({}, text, text),
    )


def test_a_script_is_escaped_in_every_position() -> None:
    document = outline(everything(EVIL))
    assert "script" not in document.tags
    assert "img" not in document.tags
    assert not [name for name, _ in document.attributes if name.startswith("on")]
    # Page 4 times, section 2, table 5, numbers 2, bar chart 2, line chart 3, empty chart 1.
    assert document.text.count(EVIL) == 19
    assert [value for name, value in document.attributes if name == "aria-label"] == [f"{EVIL} over {EVIL}"]


def test_a_page_loads_nothing() -> None:
    document = everything("plain")
    assert not re.search(r"https?:|//|url\(|@import|src=|href=|<link|<script", document)
    assert "default-src 'none'" in document


def test_a_page_is_the_same_document_apart_from_its_text() -> None:
    # <wbr> marks where a long word may be broken.
    tags = [tag for tag in outline(everything(EVIL)).tags if tag != "wbr"]
    assert tags == outline(everything("plain")).tags


def test_only_what_the_module_made_is_markup() -> None:
    inner = report.table(["a"], [[1]])
    assert "<table>" in report.section("s", inner)
    assert "<table>" not in report.section("s", str.__str__(inner))


def test_characters_that_cannot_be_written_or_that_deceive_are_shown_as_codes() -> None:
    document = report.page("t", "a\ud800b\u202ec\x00d")
    document.encode("utf-8")
    assert "a\\ud800b\\u202ec\\u0000d" in document


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1234567, "1,234,567"), (0.123456, "0.1235"), (True, "yes"), (None, "-"), (12345.6, "12,346"), ("a<b", "a&lt;b")],
)
def test_values_are_shown_as_a_person_reads_them(value: object, expected: str) -> None:
    assert f">{expected}</td>" in report.key_value_table({"n": value})


def test_a_long_word_may_be_broken_and_loses_no_letter() -> None:
    label, text = "label=declined_cash_withdrawal", "x" * 45 + " short_words stay whole <b>"
    markup = report.key_value_table({"a": label, "b": text})
    assert "<td>label=<wbr>declined_<wbr>cash_<wbr>withdrawal</td>" in markup
    assert f"<td>{'x' * 20}<wbr>{'x' * 20}<wbr>xxxxx short_words stay whole &lt;b&gt;</td>" in markup
    assert outline(markup).text.split("\n")[1:3] == [f"a{label}", f"b{text}"]


def test_bars_are_as_long_as_their_values() -> None:
    chart = report.bar_chart({"a": 4.0, "b": 1.0, "none": 0.0, "bad": float("nan")})
    assert re.findall(r"width:([\d.]+)%", chart) == ["100.00", "25.00"]


def test_lines_are_drawn_to_scale() -> None:
    chart = report.line_chart({"loss": [(0, 0), (5, 5), (10, 10), (11, float("nan"))]}, "step", "nats")
    points = re.search(r'points="([^"]+)"', chart)
    assert points
    (x0, y0), (x1, y1), (x2, y2) = ((float(v) for v in p.split(",")) for p in points[1].split())
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert y0 > y2  # up is more


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [3.0], [-2.5, 17.0], [1e-7, 2e-7], [0.0], [1e9, 1e9 + 1], [0.3, 0.30001]]
)
def test_ticks_enclose_the_values_and_are_few(values: list[float]) -> None:
    ticks = report.axis_ticks(values)
    assert ticks[0] <= min(values)
    assert ticks[-1] >= max(values)
    assert 3 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_a_forest_plot_puts_every_interval_under_one_scale_and_escapes_its_names() -> None:
    rows = [report.ForestRow("<b>over</b>", 0.2, 0.1, 0.3, 0.0), report.ForestRow("under", -0.1, -0.2, 0.0)]
    html = report.forest_plot(rows, "gain & loss")
    assert "&lt;b&gt;over&lt;/b&gt;" in html
    assert "gain &amp; loss" in html
    # The scale is -0.2 to 0.3 with 4 % of 0.5 to either side: 0 stands at (0 + 0.22) / 0.54.
    # Each line's zero, and the first one's limit.
    assert html.count(f"left:{0.22 / 0.54 * 100:.2f}%") == 3
    assert f"left:{(0.1 + 0.22) / 0.54 * 100:.2f}%;right:{(0.32 - 0.3) / 0.54 * 100:.2f}%" in html
    assert html.count('class="limit"') == 1
    assert "+0.200 (+0.100 to +0.300), limit 0" in html


def test_a_forest_plot_of_nothing_says_so() -> None:
    assert "nothing was measured" in report.forest_plot([], "gain")
    assert "nothing was measured" in report.forest_plot([report.ForestRow("x", math.nan, math.nan, math.nan)], "gain")


def test_a_stacked_table_names_each_cell_and_scrolls_nothing() -> None:
    markup = report.table(["<rule>", "rows", "share", "first"], [["a", 1, "2%", "b.jsonl:1"]], stack=True)
    assert 'data-label="&lt;rule&gt;"' in markup
    assert 'data-label="rows">1</td>' in markup
    assert "wide" not in markup


def test_bars_have_a_limit_and_a_second_bar_on_one_scale() -> None:
    chart = report.bar_chart({"a": 1.0, "b": 4.0}, before={"a": 2.0}, limit=5.0, out=["b"], notes={"a": "<note>"})
    # The limit is the longest of all.
    assert re.findall(r'class="bar([^"]*)" style="width:([\d.]+)%', chart) == [
        ("", "20.00"), (" before", "40.00"), (" out", "80.00")
    ]  # fmt: skip
    assert chart.count('class="limit" style="left:100.00%"') == 2
    assert "&lt;note&gt;" in chart
    assert "width:10.00%" in report.bar_chart({"a": 1.0}, longest=10.0)


def test_lists_and_folded_blocks_escape_what_they_hold() -> None:
    markup = report.bullets([EVIL, report.join(report.highlight("warn"), EVIL)]) + report.details(EVIL, EVIL)
    document = outline(markup)
    assert document.text.count(EVIL) == 4
    assert "script" not in document.tags


def test_a_scatter_plot_joins_the_marked_points_and_escapes_their_names() -> None:
    points = [
        ScatterPoint("rank <4>", 1.0, 0.5, is_on_line=True),
        ScatterPoint("rank 8", 2.0, 0.7, is_on_line=True),
        ScatterPoint("rank 16", 3.0, 0.6),
        ScatterPoint("lost", math.nan, 0.6),
    ]
    drawing = scatter_chart(points, "MiB", "accuracy", "a caption")
    assert drawing.count("<circle") == 3
    [line] = re.findall(r'<polyline points="([^"]*)"', drawing)
    (left, low), (right, high) = (map(float, pair.split(",")) for pair in line.split())
    assert left < right
    assert low > high  # the y axis of a drawing points down
    assert "rank &lt;4&gt;: 1, 0.5" in drawing
    assert "rank 16: 3, 0.6" in drawing
    assert "<4>" not in drawing
    assert "nothing was measured" in scatter_chart(points[3:], "MiB", "accuracy")
