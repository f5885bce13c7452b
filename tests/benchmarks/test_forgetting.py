"""The benchmark of forgetting: growing parts, the same rows for each variant, a table and a page."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.config.line import load


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the benchmark with its own folder on the path, as when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import forgetting

    return forgetting


@pytest.fixture
def options(benchmark: Any, tmp_path: Path) -> Namespace:
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 50), ("test", 20)):
        rows = [{"text": f"{name} question, number {i}", "category": f"label {i * 3 // count}"} for i in range(count)]
        benchmark.write_rows(data / f"{name}.csv", rows)
    return Namespace(
        data=data, base=tmp_path / "base", reference=None, replay=None, parts=5, rows=40, steps=7, eval_rows=10
    )


def test_each_part_has_the_rows_of_the_parts_before(benchmark: Any, options: Namespace, tmp_path: Path) -> None:
    benchmark.write_line(options, tmp_path / "line")
    before: set[str] = set()
    for part in range(1, 6):
        benchmark.write_part(options, tmp_path / "line", part)
        rows = {row["text"] for row in benchmark.read_rows(tmp_path / "line/raw/train.csv")}
        assert before < rows
        assert len(rows) == 8 * part
        before = rows
    test_rows = benchmark.read_rows(tmp_path / "line/test/test.csv")
    assert len(test_rows) == 10
    # Real files are sorted by label, and the first rows of one would have a few labels alone.
    assert len({row["category"] for row in test_rows}) == 3


def test_every_variant_is_a_line_that_can_run(benchmark: Any, options: Namespace, tmp_path: Path) -> None:
    folder = tmp_path / "line"
    benchmark.write_line(options, folder)
    for settings in benchmark.VARIANTS.values():
        overrides = [setting.replace("=replay", f"={folder / 'replay'}") for setting in settings]
        config = load(folder / "forgetting.yaml", overrides)
        assert config.train.max_steps == 7
    # What is measured is no part of what trains.
    texts = [
        {line for line in (folder / name / "general.jsonl").read_text().split("\n") if line}
        for name in ("reference", "replay")
    ]
    assert len(texts[0]) == len(texts[1]) == 18
    passages = [json.loads(line).get("text") for line in texts[0]]
    assert not any(passage and passage in chat for passage in passages for chat in texts[1])
    assert yaml.safe_load((folder / "forgetting.yaml").read_text())["sources"]["eval_data"] == "test"


def test_the_results_are_a_table_and_a_page(benchmark: Any) -> None:
    numbers = {"accuracy": 0.5, "loss": 1.25, "forgotten_nats": 0.125, "form": "dequantized"}
    results = {
        "base": {"2": numbers, "10": {**numbers, "accuracy": 0.75}},
        "soup": {"2": {**numbers, "form": "dequantized, soup of 2"}},
    }
    table = benchmark.table(results).split("\n")
    assert table[2:] == [
        "| base | 2 | 0.500 | 1.2500 | 0.1250 | dequantized |",
        "| base | 10 | 0.750 | 1.2500 | 0.1250 | dequantized |",
        "| soup | 2 | 0.500 | 1.2500 | 0.1250 | dequantized, soup of 2 |",
    ]
    page = benchmark.page(results)
    assert page.count("<svg") == 4
    assert "base: a task loss of 1.250, 0.750 accuracy, 0.125 nats forgotten" in page
