"""The shape of the data: the numbers, what is a warning, and lengths as a plot with the limit."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from components.validate_data.checks import Row
from components.validate_data.lengths import count_lengths, plot_lengths
from components.validate_data.shape import check_shape, measure_shape
from qlora_retrain.config.data import DataConfig


def row(answer: str = "refund", tokens: int = 100, supervised_tokens: int = 10, turns: int = 1, **fields: Any) -> Row:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] * turns
    return Row("a.jsonl", 1, messages, "0", tokens=tokens, supervised_tokens=supervised_tokens, **fields)


def shape_of(train: list[Row], evaluation: list[Row], others: list[Row]) -> dict[str, Any]:
    sides = {"train": train, "eval": evaluation, "golden": []}
    return measure_shape([*train, *evaluation, *others], sides, is_closed_set=True)


def test_the_shape_is_counted_by_side() -> None:
    train = [
        row(prompt_id="1"),
        row(prompt_id="1", turns=2),
        row("late", 200, 90, prompt_id="2"),
        row("late"),
        row("one"),
    ]
    evaluation = [row(prompt_id="3") for _ in range(4)]
    shape = shape_of(train, evaluation, [row(reason="too_long", tokens=9000), row(tokens=0, reason="missing_field")])
    assert shape == {
        "rows_per_prompt": {"train": round(5 / 3, 6), "eval": 4.0, "golden": None},
        "too_long_fraction": 0.1,
        "supervised_fraction": {"train": round(130 / 600, 6), "eval": 0.1, "golden": None},
        "multi_turn_fraction": {"train": 0.2, "eval": 0.0, "golden": None},
        "label_imbalance": {"most_rows": 2, "fewest_rows": 2, "ratio": 1.0},
    }


def outcomes(
    reference: dict[str, Any] | None = None, config: DataConfig | None = None, **changes: Any
) -> dict[str, str]:
    shape = {
        "rows_per_prompt": {"eval": 1.0}, "too_long_fraction": 0.0, "supervised_fraction": {"train": 0.5},
        "label_imbalance": {"ratio": 5.0},
    }  # fmt: skip
    return {
        finding.name: finding.outcome for finding in check_shape(shape | changes, reference, config or DataConfig())
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("too_long_fraction", {"too_long_fraction": 0.011}),
        ("supervised_fraction", {"supervised_fraction": {"train": 0.019}}),
        ("rows_per_prompt", {"rows_per_prompt": {"eval": 7.6}}),
        ("label_imbalance", {"label_imbalance": {"ratio": 101.0}}),
    ],
)
def test_a_number_beyond_its_usual_range_is_a_warning(name: str, changes: dict[str, Any]) -> None:
    assert set(outcomes().values()) == {"met"}
    assert outcomes(**changes) == outcomes() | {name: "warn"}


def test_rows_of_a_named_group_belong_together() -> None:
    assert "rows_per_prompt" not in outcomes(config=DataConfig(group_field="document"), rows_per_prompt={"eval": 9.0})


@pytest.mark.parametrize(
    ("growth", "psi", "expected"),
    [
        (1.0, 0.05, ("met", "met")),
        (0.49, 0.11, ("warn", "warn")),
        (2.1, 0.26, ("warn", "refuse")),
        (None, None, (None, None)),
    ],
)
def test_growth_and_drift_are_judged_beside_the_reference(growth: Any, psi: Any, expected: Any) -> None:
    drift = [] if psi is None else [{"beyond_chance": 0.01}, {"beyond_chance": psi}]
    result = outcomes({"growth": growth, "drift": drift})
    assert (result.get("growth"), result.get("drift")) == expected


def test_lengths_are_counted_in_ranges_that_end_at_the_limit() -> None:
    lengths = [1, 2, 3, 5, 40, 63, 64, 100, 101, 5000]
    histogram = count_lengths([*lengths, 0], limit=100)
    ranges = [tuple(map(int, name.split("-"))) for name in histogram]
    # Every number is in one range, none has both sides of the limit, and four make a doubling.
    assert all(previous[1] + 1 == following[0] for previous, following in itertools.pairwise(ranges))
    assert set(histogram.values()) >= {0, 1}
    assert sum(histogram.values()) == len(lengths)
    assert [low for low, _ in ranges if 64 <= low < 128] == [64, 77, 91, 101, 108]
    for (low, high), count in zip(ranges, histogram.values(), strict=True):
        assert count == sum(low <= length <= high for length in lengths)
    assert count_lengths([], 100) == {}


def test_the_plot_always_shows_the_limit_and_marks_what_is_beyond_it() -> None:
    plot = plot_lengths(count_lengths([40] * 9 + [60], 1024), 1024)
    assert "limit 1,024" in plot
    assert "var(--s1)" not in "".join(re.findall(r"<i title[^>]*>", plot))
    plot = plot_lengths(count_lengths([40, 3000], 1024), 1024)
    assert re.findall(r'title="(\d+) chats[^"]*"[^>]*var\(--s([01])\)', plot) == [("1", "0"), ("1", "1")]
    # Nothing stands outside of the drawing.
    assert all(0 <= float(place) <= 100 for place in re.findall(r"left:([-\d.]+)%", plot))
    assert "No row" in plot_lengths({}, 1024)
