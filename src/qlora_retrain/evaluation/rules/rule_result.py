"""Hold the result of one rule, and build the table of all rules for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_retrain.core import html
from qlora_retrain.evaluation.stats import Interval


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule and whether the challenger passed it.

    Attributes:
        name: The rule's name, e.g. `gain_over_base`.
        text: The result as a sentence for a person.
        value: The measured number.
        low: The lower end of its interval.
        high: The upper end of its interval.
        limit: The limit that the number was compared with.
        passed: True or False; None: there is not enough evidence to decide.
        is_measured: Whether the rule could be applied at all; one that could not be refuses nothing, and is shown.
    """

    name: str
    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    passed: bool | None = None
    is_measured: bool = True

    @classmethod
    def from_interval(
        cls, name: str, text: str, interval: Interval, limit: float, passed: bool | None = None
    ) -> RuleResult:
        """Build the result of a rule that compares an interval with a limit."""
        return cls(name, text, interval.value, interval.low, interval.high, limit, passed)


def format_interval(interval: Interval, sign: str = "+") -> str:
    """Write an interval for a sentence; `sign` is `+` for a difference and empty for a value of its own."""
    return f"{interval.value:{sign}.4f} ({interval.low:{sign}.4f} to {interval.high:{sign}.4f})"


def rules_table(rules: Sequence[RuleResult]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows for the report; rules that did not pass come first. The sentences hold the numbers."""
    words = {True: "passed", False: html.highlight("failed"), None: html.highlight("not enough evidence")}
    # Rules that failed, then rules without enough evidence, then rules that were not measured, then those that passed.
    ordered = sorted(rules, key=lambda r: (r.passed is True, r.passed is None, r.is_measured))
    return ["rule", "", "result"], [
        [r.name.replace("_", " "), words[r.passed] if r.is_measured else html.highlight("not measured"), r.text]
        for r in ordered
    ]
