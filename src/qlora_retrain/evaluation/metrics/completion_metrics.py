"""Compare a generated completion with the right answer: every metric is a number in [0, 1] for one row.

The metrics are exact match, ROUGE-L (Lin 2004: F1 over the longest common subsequence of words) and chrF (Popović
2015, by sacrebleu). For answers that are JSON they are also validity, and the share of fields with equal values. For
answers that call tools they are also whether all calls are right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import json_depth
from qlora_retrain.evaluation.metrics.call_metrics import RenderedCalls


def compute(
    metrics: Sequence[str], answer: str, completion: str, calls: RenderedCalls | None = None
) -> dict[str, float]:
    """Compute the metrics of a row by name; metrics that are not defined for it are left out.

    `json_validity` and `field_accuracy` are defined only where the right answer is JSON, `tool_call_match` only where
    it calls tools.

    Args:
        metrics: The names.
        answer: The right answer.
        completion: What the model generated.
        calls: Both with the marks of their calls, where the right answer calls tools.
    """
    values = {name: _METRICS[name](answer, completion) for name in metrics if name in _METRICS}
    if calls is not None:
        # Equal calls may differ in the order and the white space of their arguments.
        call_functions = {"exact_match": calls.is_exact, "tool_call_match": calls.has_same_calls}
        values |= {name: float(call_functions[name]()) for name in metrics if name in call_functions}
    return {name: value for name, value in values.items() if value is not None}


def exact_match(answer: str, completion: str) -> float:
    """Return 1 where both are the same text, apart from white space at the ends."""
    return float(answer.strip() == completion.strip())


def rouge_l(answer: str, completion: str) -> float:
    """Compute F1 over the longest common subsequence of words of any script, ignoring case and punctuation."""
    first, second = _words(answer), _words(completion)
    if not first or not second:
        return float(first == second)

    # Dynamic programming over the usual table; only one row of the table is in memory.
    row = [0] * (len(second) + 1)
    for word in first:
        upper_left = 0
        for i, second_word in enumerate(second, 1):
            upper_left, row[i] = row[i], upper_left + 1 if word == second_word else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(first) + len(second))


def chrf(answer: str, completion: str) -> float:
    """Compute chrF2 of the text: the F-score over n-grams of 1 to 6 characters; recall counts twice."""
    from sacrebleu import sentence_chrf

    # sacrebleu scores from 0 to 100.
    score: float = sentence_chrf(completion, [answer]).score
    return score / 100


def json_validity(answer: str, completion: str) -> float | None:
    """Return 1 where the whole completion is JSON; None where the answer is not JSON."""
    return None if _parse_json(answer) is _NOT_JSON else float(_parse_json(completion) is not _NOT_JSON)


def field_accuracy(answer: str, completion: str) -> float | None:
    """Compute the share of the answer's fields that the completion holds with equal values.

    Nested fields are identified by their paths. Return None where the answer is not JSON.
    """
    expected = _parse_json(answer)
    if expected is _NOT_JSON:
        return None
    # A completion that is not JSON has one leaf, which equals no field of the answer.
    expected_fields, actual_fields = dict(_leaves(expected)), dict(_leaves(_parse_json(completion)))
    equal = sum(
        path in actual_fields and _is_same(actual_fields[path], value) for path, value in expected_fields.items()
    )
    return equal / len(expected_fields)


_METRICS = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "json_validity": json_validity,
    "field_accuracy": field_accuracy,
}
COMPLETION_METRICS = (*_METRICS, "tool_call_match")
_NOT_JSON = object()


def selected_completion_metrics(settings: EvaluateConfig) -> tuple[str, ...]:
    """Return the line's metrics that need the contestants' own answers."""
    return tuple(name for name in settings.metrics if name in COMPLETION_METRICS)


def needs_completions(settings: EvaluateConfig) -> bool:
    """Return whether the contestants generate an answer to every row."""
    return bool(selected_completion_metrics(settings)) or settings.label_scoring == "generation"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _parse_json(text: str) -> Any:
    try:
        return json_depth.loads(text, parse_constant=_refuse_constant)
    # A model may generate thousands of opening brackets.
    except ValueError:
        return _NOT_JSON


def _refuse_constant(word: str) -> None:
    """Refuse NaN and Infinity, which Python's parser accepts.

    JSON has neither (RFC 8259, section 6), so another program that parses the answer may fail on them.
    """
    raise ValueError(word)


def _leaves(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its path; an empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            # Quoted, so that a dot or a bracket in a name cannot look like another path.
            yield from _leaves(child, f"{path}.{json.dumps(name)}")
    elif isinstance(value, list) and value:
        for i, child in enumerate(value):
            yield from _leaves(child, f"{path}[{i}]")
    else:
        yield path, value


def _is_same(first: Any, second: Any) -> bool:
    """Compare values and kinds, because in Python True equals 1."""
    return isinstance(first, bool) == isinstance(second, bool) and first == second
