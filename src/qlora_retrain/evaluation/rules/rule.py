"""One rule and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_retrain.core import html
from qlora_retrain.evaluation.stats import Interval


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule and how it went.

    Attributes:
        name: E.g. `gain_over_base`.
        text: What was found, for a person.
        value: The measured number.
        low: Lower end of its interval.
        high: Upper end of its interval.
        limit: What it was held against.
        passed: True or False; None: not enough evidence to say.
    """

    name: str
    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    passed: bool | None = None


def ends(found: Interval) -> tuple[float, float, float]:
    """A rule's `value`, `low` and `high`."""
    return found.value, found.low, found.high


def said(found: Interval, sign: str = "+") -> str:
    """An interval in a sentence; `sign` is `+` for a difference, empty for a level."""
    return f"{found.value:{sign}.4f} ({found.low:{sign}.4f} to {found.high:{sign}.4f})"


def table(rules: Sequence[Rule]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows for the report, what did not pass first; the texts have the numbers."""
    word = {True: "passed", False: html.bad("failed"), None: html.bad("not enough evidence")}
    ordered = sorted(rules, key=lambda r: (r.passed is True, r.passed is None))
    return ["rule", "", "what was found"], [[r.name.replace("_", " "), word[r.passed], r.text] for r in ordered]
