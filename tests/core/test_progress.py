"""A progress update comes from another process, or from a file that somebody else may have written."""

from __future__ import annotations

import json

import pytest

from qlora_retrain.core import progress


def test_an_update_is_read_as_it_was_written() -> None:
    update = progress.from_json('{"time": 1.5, "what": "training", "done": 30, "total": 300.0, "loss": 0.41234}')
    assert update is not None
    assert progress.describe(update) == "training 30/300  loss 0.4123"


@pytest.mark.parametrize(
    "text",
    [
        '{"time": 1, "what": "training", "done": "30", "total": 300}',
        '{"time": 1, "what": ["training"], "done": 30, "total": 300}',
        '{"time": 1, "what": "training", "done": null, "total": 300}',
        '{"time": 1, "what": "training", "done": 30}',
        "[1, 2]",
        "3",
        "{",
        "\x00",
        "[" * 100_000,
    ],
)
def test_what_is_no_update_is_none_and_no_crash(text: str) -> None:
    assert progress.from_json(text) is None
    assert progress.parse_update(text) is None


def test_a_line_of_a_log_is_no_update() -> None:
    assert progress.parse_update("loss 0.41") is None
    assert progress.parse_update(json.dumps({"time": 1, "what": "x", "done": 1, "total": 2})) is not None
