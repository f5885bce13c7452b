"""How near a written answer is to the right one: each metric a number in [0, 1], of one row.

Exact match, ROUGE-L (Lin 2004: F1 over the longest common subsequence of words), chrF (Popović 2015, by sacrebleu),
and for answers that are JSON: whether the text is JSON, and the share of the answer's fields that it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any


def measure(metrics: Sequence[str], answer: str, written: str) -> dict[str, float]:
    """The metrics of a row, by name; those that say nothing of it are left out.

    `json_validity` and `field_accuracy` say something only where the right answer is JSON.
    """
    found = {name: _METRICS[name](answer, written) for name in metrics}
    return {name: value for name, value in found.items() if value is not None}


def exact_match(answer: str, written: str) -> float:
    """1 where both are the same text, white space at the ends aside."""
    return float(answer.strip() == written.strip())


def rouge_l(answer: str, written: str) -> float:
    """F1 over the longest common subsequence of words, without case and punctuation; words of any script."""
    first, second = _words(answer), _words(written)
    if not first or not second:
        return float(first == second)
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0  # the entry to the upper left
        for i, other in enumerate(second, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(first) + len(second))


def chrf(answer: str, written: str) -> float:
    """chrF2 of the sentence: F-score over n-grams of 1 to 6 characters, recall counting twice."""
    from sacrebleu import sentence_chrf

    score: float = sentence_chrf(written, [answer]).score
    return score / 100


def json_validity(answer: str, written: str) -> float | None:
    """1 where the written text is JSON as a whole; None where the answer is none."""
    return None if _parsed(answer) is _NOT_JSON else float(_parsed(written) is not _NOT_JSON)


def field_accuracy(answer: str, written: str) -> float | None:
    """The share of the answer's fields, nested ones by their path, that the written JSON holds with equal values."""
    wanted = _parsed(answer)
    if wanted is _NOT_JSON:
        return None
    fields, found = dict(_fields(wanted)), dict(_fields(_parsed(written)))
    equal = sum(path in found and _same(found[path], value) for path, value in fields.items())
    return equal / len(fields)


_METRICS = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "json_validity": json_validity,
    "field_accuracy": field_accuracy,
}
_NOT_JSON = object()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _no_json(word: str) -> None:
    """Python reads NaN and Infinity; JSON has neither (RFC 8259, section 6), and whoever parses an answer may not."""
    raise ValueError(word)


def _fields(value: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path; an empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _fields(inner, f"{path}.{json.dumps(name)}")
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _fields(inner, f"{path}[{i}]")
    else:
        yield path, value


def _same(first: Any, second: Any) -> bool:
    """Equal, and of one kind: in Python True is 1."""
    return isinstance(first, bool) == isinstance(second, bool) and first == second
