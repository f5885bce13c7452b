"""The grid of a lab: every combination once and in order, and what cannot be run is refused before anything runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_retrain.config.line import load
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lab.grid import MAX_POINTS, Grid, Point, build_grid, points_of, skipped
from qlora_retrain.lab.variations import parse_variation, read_named

KNOBS = ("train.rank", "train.epochs", "quantize.double_quant", "train.target_modules")
VALUE = st.one_of(st.integers(-5, 99), st.booleans(), st.none(), st.lists(st.sampled_from("abc"), max_size=3))


def texts_of(values: list[object]) -> str:
    return ",".join(json.dumps(value) for value in values)


@given(st.dictionaries(st.sampled_from(KNOBS), st.lists(VALUE, min_size=1, max_size=4, unique_by=json.dumps)))
def test_a_grid_is_the_product_of_its_values_in_the_order_of_the_command_line(grid: dict[str, list[object]]) -> None:
    variations = [parse_variation(f"{knob}={texts_of(values)}") for knob, values in grid.items()]
    assert [list(v.values) for v in variations] == list(grid.values())

    points = points_of(variations, None)
    expected = list(itertools.product(*([(knob, value) for value in values] for knob, values in grid.items())))
    assert [point.settings for point in points] == expected
    assert [p.seed for p in points_of(variations, 2)] == [0, 1] * len(expected)
    assert [p.settings for p in points_of(variations, 2)[::2]] == expected


def test_values_are_yaml_and_a_list_stands_in_brackets() -> None:
    values = parse_variation("train.target_modules=all-linear,[q_proj,v_proj]").values
    assert values == ("all-linear", ["q_proj", "v_proj"])
    assert parse_variation("train.method=lora,lora+").values == ("lora", "lora+")
    assert parse_variation("train.alpha=null,8.5").values == (None, 8.5)
    assert parse_variation(" train.rank = 4, 8 ") == parse_variation("train.rank=4,8")
    # A pattern that looks like a range.
    pattern = r".*\.[0-9]\.self_attn\..*"
    assert parse_variation(f"train.target_modules='{pattern}',mlp").values == (pattern, "mlp")
    assert parse_variation("train.target_modules=model.layers.0..*").values == ("model.layers.0..*",)


def test_a_label_has_the_settings_in_words() -> None:
    assert Point((("train.rank", 8), ("train.method", "dora"))).label == "rank 8, method dora"
    # Two settings of one name are told apart.
    assert Point((("train.device", "cpu"), ("merge.device", "cuda"))).label == "train.device cpu, merge.device cuda"
    assert Point((("train.rank", 8),), seed=2).run_label == "rank 8, seed 2"
    assert Point(()).label == "the line's settings"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.rank", "expected SECTION.KNOB=VALUE,VALUE"),
        ("rank=4", "expected SECTION.KNOB=VALUE,VALUE"),
        ("train.rank=", "expected SECTION.KNOB=VALUE,VALUE"),
        ("train.rank=4,[8", "not valid YAML"),
        ("train.rank=4,8,4", "names the value 4 twice"),
        ("data.system=a,b", "all runs of a lab share their data"),
        ("train.start=base,champion", "no run of a lab reads an earlier version"),
        ("merge.soup=2,3", "versions have learnt the rows that judge; leave merge.soup out"),
        ("evaluate.seed=1,2", "set evaluate.seed for all of them with --set"),
    ],
)
def test_a_variation_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^--vary") as caught:
        parse_variation(text)
    assert message in str(caught.value)


def test_a_setting_is_varied_once_and_a_grid_has_a_limit() -> None:
    twice = [parse_variation("train.rank=4"), parse_variation("train.rank=8")]
    with pytest.raises(UsageError, match=r"train.rank: expected each setting once"):
        points_of(twice, None)
    with pytest.raises(UsageError, match="--seeds varies it too"):
        points_of([parse_variation("train.seed=1,2")], 3)
    with pytest.raises(UsageError, match=r"2,002 points, expected at most 1,000"):
        points_of([parse_variation(f"train.rank={','.join(map(str, range(1, MAX_POINTS + 2)))}")], 2)


def named_points(folder: Path, text: str) -> Path:
    path = folder / "points.yaml"
    path.write_text(text)
    return path


def test_named_settings_are_one_more_variation(tmp_path: Path) -> None:
    path = named_points(tmp_path, "small: {train.rank: 4}\nfull: {train.method: full, quantize.format: none}\n")
    points = points_of([parse_variation("train.epochs=1,2")], None, read_named(path))
    assert [point.label for point in points] == [
        "small, epochs 1", "small, epochs 2", "full, epochs 1", "full, epochs 2",
    ]  # fmt: skip
    assert points[3].overrides == ['train.method="full"', 'quantize.format="none"', "train.epochs=2"]
    assert [point.label for point in points_of([], None, read_named(path))] == ["small", "full"]
    with pytest.raises(UsageError, match=r"train.rank: expected each setting once"):
        points_of([parse_variation("train.rank=4,8")], None, read_named(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected names with settings"),
        ("[train.rank]", "expected names with settings"),
        ("small: 4", "small: expected settings as"),
        ("small: {rank: 4}", "small: expected settings as"),
        ("small: {evaluate.seed: 4}", "all runs of a lab share their data"),
        ("a: {train.rank: 4}\nb: {train.rank: 4}", "a and b have the same settings"),
        ("a: {train.rank: 4", "not valid YAML"),
        # Of a name that is written twice, YAML keeps the last.
        ("a: {train.rank: 4}\na: {train.rank: 8}", "a is written twice"),
        ('4: {train.rank: 4}\n"4": {train.rank: 8}', "4 is written twice"),
        ("a: {train.rank: 4, train.rank: 8}", "train.rank is written twice"),
        ('"": {train.rank: 4}', "expected a name in one line that can be printed, found ''"),
        ('"a\\nb": {train.rank: 4}', r"can be printed, found 'a\\nb'"),
        ('"\\u202e": {train.rank: 4}', r"can be printed, found '\\u202e'"),
    ],
)
def test_a_file_of_points_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_named(named_points(tmp_path, text))


def test_a_named_setting_that_the_line_refuses_names_its_origin(line: Path, tmp_path: Path) -> None:
    named = read_named(named_points(tmp_path, "a: {train.rank: 4}\nb: {train.rank: 0}"))
    with pytest.raises(UsageError, match=r"--points train.rank=0: .*greater than or equal to 1"):
        build_grid(points_of([], None, named), lambda p: load(line, p.overrides), skip_impossible=True)


def build(line: Path, *texts: str, skip_impossible: bool = False) -> Grid[int]:
    points = points_of([parse_variation(text) for text in texts], None)
    return build_grid(points, lambda point: load(line, point.overrides).train.rank, skip_impossible=skip_impossible)


def test_a_grid_is_built_by_the_line(line: Path) -> None:
    grid = build(line, "train.rank=4,8", "train.learning_rate=1e-4,2e-4")
    assert [rank for _, rank in grid.points] == [4, 4, 8, 8]


@pytest.mark.parametrize("skip", [False, True])
def test_an_unknown_setting_or_value_is_refused_with_the_lines_own_error(line: Path, skip: bool) -> None:
    with pytest.raises(UsageError, match=r"--vary train.rnk=4: .*train.rnk: unknown field; did you mean rank\?"):
        build(line, "train.rnk=4,8", skip_impossible=skip)
    with pytest.raises(UsageError, match=r"--vary train.method=lara: .*did you mean lora"):
        build(line, "train.rank=4", "train.method=lora,lara", skip_impossible=skip)
    with pytest.raises(UsageError, match=r"--vary train.rank=0: .*greater than or equal to 1"):
        build(line, "train.rank=0,8", skip_impossible=skip)


def test_an_impossible_combination_is_refused_by_its_name_or_left_out(line: Path) -> None:
    texts = ("train.method=lora,lora+", "train.learning_rate_ratio=4,16")
    with pytest.raises(UsageError) as caught:
        build(line, *texts)
    assert str(caught.value).startswith("method lora, learning_rate_ratio 4: ")
    assert "2 of 4 combinations cannot be run" in str(caught.value)

    grid = build(line, *texts, skip_impossible=True)
    assert [point.label for point, _ in grid.points] == [
        "method lora+, learning_rate_ratio 4",
        "method lora+, learning_rate_ratio 16",
    ]
    assert [label for label, _ in skipped(grid)] == [
        "method lora, learning_rate_ratio 16",
        "method lora, learning_rate_ratio 4",
    ]
    assert all("is for method: lora+" in reason for _, reason in skipped(grid))


def test_a_grid_without_a_possible_point_is_refused(line: Path) -> None:
    with pytest.raises(UsageError, match=r"1 of 1 combinations cannot be run: change --vary$"):
        build(line, "train.method=lora", "train.learning_rate_ratio=4", skip_impossible=True)
