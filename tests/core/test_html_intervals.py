"""The chart of values with intervals: everything finite is drawn, everything else is left out, and text is escaped."""

from __future__ import annotations

import math
import re

from qlora_retrain.core.html_intervals import IntervalPoint, IntervalValue, interval_chart


def test_each_value_is_drawn_between_its_ends() -> None:
    points = [
        IntervalPoint("1", "one", IntervalValue(0.5, 0.4, 0.6), IntervalValue(0.45)),
        IntervalPoint("2", "two", None),
    ]
    chart = interval_chart(points, "accuracy", ("here", "there"))
    ends = re.findall(r'y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" stroke=', chart)
    assert len(ends) == 1
    middle = re.search(r'cy="([\d.]+)" r="4" fill="var\(--s0\)"/></g>', chart)
    assert middle
    # The y axis points down, and 0.5 lies halfway.
    assert float(ends[0][0]) - float(middle[1]) == float(middle[1]) - float(ends[0][1]) > 0
    assert "one: 0.45</title>" in chart
    assert " style=" not in chart


def test_what_is_not_finite_is_left_out() -> None:
    point = IntervalPoint("1", "one", IntervalValue(math.nan), IntervalValue(0.5, -math.inf, 0.6))
    chart = interval_chart([point], "<loss>", ("a", "b"))
    assert "nan" not in chart
    assert chart.count("<title>") == 1
    assert "&lt;loss&gt;" in chart
    assert interval_chart([], "<loss>", ("a", "b")) == "<p>&lt;loss&gt;: nothing was measured.</p>"


def test_many_places_have_few_labels_and_the_last_one_has_one() -> None:
    points = [IntervalPoint(f"<{i}>", str(i), IntervalValue(float(i))) for i in range(50)]
    chart = interval_chart(points, "loss", ("a", "b"))
    labels = re.findall(r"&lt;(\d+)&gt;", chart)
    assert labels[-1] == "49"
    assert len(labels) <= 8
