"""A line that names a method and no learning rate gets one that suits the method, with the reason in its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.config.line import load
from qlora_retrain.config.methods import ADAPTER_RATE, METHODS
from qlora_retrain.pipeline.auto_settings import resolve_auto_settings


@pytest.fixture
def line(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.yaml"
    path.write_text("line: tickets\nsources: {raw_data: rows.jsonl, base_model: model}\n")
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_that_is_not_set_is_the_methods(line: Path, method: str) -> None:
    facts = METHODS[method]
    settings = [f"train.method={method}", f"quantize.format={facts.formats[0]}"]
    sections, choices = resolve_auto_settings(load(line, settings))
    assert sections["train"].model_dump()["learning_rate"] == facts.learning_rate
    reasons = [choice.reason for choice in choices if choice.field == "train.learning_rate"]
    assert reasons == ([] if facts.learning_rate == ADAPTER_RATE else [f"not set: it suits train.method: {method}"])


def test_a_rate_that_the_line_sets_stays(line: Path) -> None:
    for rate in (ADAPTER_RATE, 7e-4):
        config = load(line, ["train.method=full", "quantize.format=none", f"train.learning_rate={rate}"])
        sections, choices = resolve_auto_settings(config)
        assert sections["train"].model_dump()["learning_rate"] == rate
        assert not [choice for choice in choices if choice.field == "train.learning_rate"]
