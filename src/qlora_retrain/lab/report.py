"""The page of a lab, made from the numbers of `lab.json` alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.core import html
from qlora_retrain.core.html import ForestRow, Html
from qlora_retrain.core.html_scatter import ScatterPoint, scatter_chart
from qlora_retrain.evaluation.rules.comparison import display_name

_MIB = 2**20
# The costs that the metric is drawn against: the number's name, its unit in the drawing, and the axis.
_AXES = (
    ("adapter_bytes", _MIB, "adapter, MiB"),
    ("peak_memory_mib", 1, "peak memory of training, MiB"),
    ("training_seconds", 1, "training, seconds"),
)
_FRONT = (
    "Named, and joined by the line, are the points that no other one beats in both. Point at another to see its name."
)
Document = Mapping[str, Any]


def render(document: Document) -> str:
    """Return the page as HTML."""
    recommendation = document["recommendation"]
    return html.page(
        f"Lab of line {document['line']}",
        recommendation["sentence"],
        *([html.bullets(recommendation["notes"])] if recommendation["notes"] else []),
        html.section("Points", _points_table(document), _explanation(document)),
        *_comparisons(document),
        html.section("What a better value costs", _FRONT, *(_pareto(document, *axis) for axis in _AXES)),
        *_seeds(document),
        *_left_out(document),
        html.section("What was measured", html.key_value_table(_facts(document))),
    )


def _points_table(document: Document) -> Html:
    name = display_name(document["metric"])
    headers = [
        "settings", name, "loss", "adapter, MiB", "parameters", "memory, MiB", "tokens/s", "seconds", "intruders",
        "forgetting, nats", "merging, nats",
    ]  # fmt: skip
    rows = [
        [
            f"{point['label']} (take)" if point["label"] == document["recommendation"]["take"] else point["label"],
            _interval(point["metric"]),
            _interval(point["loss"]),
            point["adapter_bytes"] / _MIB,
            _whole(point["trainable_parameters"]),
            _whole(point["peak_memory_mib"]),
            _whole(point["tokens_per_second"]),
            _whole(point["training_seconds"]),
            point["intruder_dimensions"],
            point["forgetting_nats"],
            point["merge_loss_nats"],
        ]
        for point in document["points"]
    ]  # fmt: skip
    return html.table(headers, rows)


def _explanation(document: Document) -> str:
    better = "lower" if document["is_lower_better"] else "higher"
    base = document["base"]
    text = (
        f"Sorted by {display_name(document['metric'])}; {better} is better. Below each value is its "
        f"{document['confidence']:.0%} interval, over {document['judge_prompts']:,} prompts of training rows that were "
        "kept out of training. "
    )
    return text + (f"The base without an adapter has {_format(base)}. " if base else "") + "A dash: not measured."


def _comparisons(document: Document) -> list[Html]:
    rows = [
        ForestRow(entry["label"], entry["gain"]["value"], entry["gain"]["low"], entry["gain"]["high"])
        for entry in document["comparisons"]
        if entry["gain"] is not None
    ]
    if not rows:
        return []
    heading = f"How much better {document['comparisons_with']} is than the others"
    text = (
        "Both on the same rows and seeds. Where the interval holds 0, the difference may be chance; it says nothing "
        "about differences that are smaller than the interval is wide."
    )
    return [html.section(heading, text, html.forest_plot(rows, display_name(document["metric"])))]


def _pareto(document: Document, cost: str, unit: float, axis: str) -> Html:
    """Draw the metric against a cost; the line joins the points that no other beats in both."""
    points = [point for point in document["points"] if point["metric"] is not None and point[cost] is not None]
    values = [(point[cost] / unit, point["metric"]["value"]) for point in points]
    on_front = pareto_front(values, is_lower_better=document["is_lower_better"])
    marks = [
        ScatterPoint(point["label"], x, y, is_on_line)
        for point, (x, y), is_on_line in zip(points, values, on_front, strict=True)
    ]
    name = display_name(document["metric"])
    return scatter_chart(marks, axis, name, f"{name}, by {axis}")


def pareto_front(values: Sequence[tuple[float, float]], *, is_lower_better: bool) -> list[bool]:
    """Return for each pair of a cost and a metric whether no other is as good in both and better in one."""
    sign = 1.0 if is_lower_better else -1.0
    pairs = [(cost, sign * value) for cost, value in values]
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in pairs) for x, y in pairs]


def _seeds(document: Document) -> list[Html]:
    points = [point for point in document["points"] if len(point["seeds"]) > 1]
    if not points:
        return []
    rows = [
        [
            point["label"],
            len(point["seeds"]),
            _mean([seed["metric"]["value"] for seed in point["seeds"] if seed["metric"]]),
            *(point["metric_range"] or [None, None]),
        ]
        for point in points
    ]
    headers = ["settings", "seeds", f"mean {display_name(document['metric'])}", "lowest", "highest"]
    return [html.section("Seeds", html.table(headers, rows))]


def _left_out(document: Document) -> list[Html]:
    sections = []
    if failed := document["failed"]:
        rows = [[entry["label"], entry["exit_code"], entry["message"]] for entry in failed]
        sections.append(html.section("Runs that did not finish", html.table(["run", "exit code", "message"], rows)))
    if skipped := document["skipped"]:
        rows = [[entry["label"], entry["reason"]] for entry in skipped]
        sections.append(html.section("Combinations that the line refuses", html.table(["settings", "reason"], rows)))
    return sections


def _facts(document: Document) -> dict[str, object]:
    return {
        "line": document["line"],
        "varied": "; ".join(f"{knob}: {', '.join(map(str, values))}" for knob, values in document["vary"].items())
        or "-",
        **({"named": ", ".join(document["named"])} if document["named"] else {}),
        "seeds": document["seeds"] or "the line's",
        "judged by, fraction of the training prompts": document["judge_fraction"],
        "rows that judge": document["judge_rows"],
        "prompts that judge": document["judge_prompts"],
        "code": document["version"],
    }


def _interval(interval: Mapping[str, float] | None) -> object:
    if interval is None:
        return None
    return html.with_interval(f"{interval['value']:.4f}", f"{interval['low']:.4f} to {interval['high']:.4f}")


def _format(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.4f} ({interval['low']:.4f} to {interval['high']:.4f})"


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
