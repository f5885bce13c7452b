"""Deep JSON is refused before a walk by recursion meets it; the depth is counted a second way, from the brackets."""

from __future__ import annotations

import json

import pytest

from components.validate_data.values import parse_json
from qlora_retrain.core import json_depth
from qlora_retrain.evaluation.metrics import call_metrics, completion_metrics


def nested(depth: int, begin: str = '{"a": ', end: str = "}") -> str:
    return begin * depth + "1" + end * depth


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")])
def test_the_depth_is_that_of_the_brackets(begin: str, end: str) -> None:
    for repeats in (0, 1, 7, 30):
        text = nested(repeats, begin, end)
        assert json_depth.depth(json.loads(text)) == text.count("[") + text.count("{")
        assert json_depth.loads(text) == json.loads(text)


@pytest.mark.parametrize("depth", [json_depth.MAX_DEPTH + 1, 500, 900, 100_000])
def test_what_is_deeper_than_any_data_is_no_json_to_anyone(depth: int) -> None:
    text = nested(depth)
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        json_depth.loads(text)
    # The arguments of a call, or a field of a CSV file; in Python's notation too.
    for written in (text, text.replace('"', "'")):
        with pytest.raises(ValueError):  # noqa: PT011 - of the standard library too
            parse_json(written)
    # What a model generated.
    assert completion_metrics._parse_json(text) is completion_metrics._NOT_JSON
    assert call_metrics._parts(nested(min(depth, 900)))[1] != []
    assert call_metrics._parsed(text) == text
