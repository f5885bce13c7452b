"""The table of methods: its claims are about points that are measured, and its verdicts follow the interval."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from qlora_retrain.evaluation.stats import Interval

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", PROJECT / "benchmarks" / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods_table"] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_every_claim_is_of_points_that_are_measured(table: ModuleType) -> None:
    points = set(yaml.safe_load((PROJECT / "benchmarks" / "methods.yaml").read_text(encoding="utf-8")))
    first_ranks = {f"qdylora, first {rank}" for rank in (2, 4, 8)}
    names = {name for claim in table.CLAIMS for name in (claim.point, claim.rival)} | set(table.NOT_TESTABLE)
    assert names <= points | first_ranks


@pytest.mark.parametrize(
    ("margin", "low", "high", "verdict"),
    [
        (0.012, -0.011, 0.05, "held"),  # no more than 1.2 points behind, whatever the truth is
        (0.012, -0.05, -0.013, "not held"),
        (0.012, -0.05, 0.05, "these rows cannot tell"),
        (0.0, 0.001, 0.02, "held"),  # better
        (0.0, -0.001, 0.02, "these rows cannot tell"),
        (0.0, -0.02, -0.001, "not held"),
    ],
)
def test_a_claim_is_judged_by_the_whole_interval(
    table: ModuleType, margin: float, low: float, high: float, verdict: str
) -> None:
    claim = table.Claim("a", "text", "b", margin)
    assert table.judge(claim, Interval((low + high) / 2, low, high)) == verdict
