"""The verdict on a challenger: pass, refuse, or insufficient evidence, and every rule behind it.

`evaluate` judges the live 4-bit model with its adapter, `merge_adapter` the merged form, so both gates are one set of
rules (`rules/`). A rule passes, fails, or cannot be judged for want of evidence; a verdict passes only where every rule
does. Pure functions of per-row scores and the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core.errors import QualityRefused
from qlora_retrain.core.outcome import Number, Report
from qlora_retrain.evaluation.metrics.measures import measure as measure
from qlora_retrain.evaluation.metrics.measures import measure_suite as measure_suite
from qlora_retrain.evaluation.metrics.measures import table as numbers_table
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import overall, sliced
from qlora_retrain.evaluation.rules.comparison import Scores, gain, metric_of, suite, unit
from qlora_retrain.evaluation.rules.rule import Rule as Rule
from qlora_retrain.evaluation.rules.rule import ends, said
from qlora_retrain.evaluation.rules.rule import table as rules_table

__all__ = [
    "Rule",
    "Verdict",
    "judge",
    "measure",
    "measure_suite",
    "merge_cost",
    "metric_of",
    "numbers_table",
    "rules_table",
]

Word = Literal["pass", "refuse", "insufficient evidence"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say together."""

    verdict: Word
    sentence: str
    rules: tuple[Rule, ...]

    def rules_as_json(self) -> list[dict[str, Any]]:
        """The rules as `evaluation.json` and `certificate.json` hold them."""
        return [asdict(rule) for rule in self.rules]

    def report(self, numbers: Mapping[str, Number]) -> Report:
        """The step's report: refused unless everything passed."""
        refused = None if self.verdict == "pass" else QualityRefused(self.sentence)
        return Report({"verdict": self.verdict, **numbers}, refused)


def judge(scores: Scores, settings: EvaluateConfig, extra: Sequence[Rule] = ()) -> Verdict:
    """Apply every rule to the contestants' scores.

    Args:
        scores: `base`, `challenger` and, where there are any, `champion` and `anchor`; rows of the suites `eval`,
            `golden` and `reference`.
        settings: The limits.
        extra: Rules that a step adds, judged with the others.
    """
    if broken := sorted(name for name, rows in scores.items() if not all(math.isfinite(s.loss_nats) for s in rows)):
        rule = Rule("finite_scores", f"{', '.join(broken)}: some rows have a loss that is not finite", passed=False)
        return _verdict([rule, *extra], "")
    rows = len(suite(scores["challenger"], "eval"))
    if rows < max(1, settings.min_rows):
        text = f"{rows} evaluation rows; at least {settings.min_rows} are needed"
        return _verdict([Rule("enough_rows", text, rows, limit=settings.min_rows), *extra], "")
    rules = [Rule("enough_rows", f"{rows} evaluation rows", rows, limit=settings.min_rows, passed=True)]
    rules += overall.all_of(scores, settings)
    rules += sliced.all_of(scores, settings, sliced.measure(scores, settings))
    return _verdict([*rules, *extra], _summary(scores, settings))


def merge_cost(live: Sequence[RowScore], merged: Sequence[RowScore], limit: float, settings: EvaluateConfig) -> Rule:
    """The rule that merging must not cost more than `limit` nats a token on the evaluation rows."""
    if not all(math.isfinite(s.loss_nats) for s in (*live, *merged)):
        return Rule("merge_cost", "the merged form's loss is not finite on some rows", limit=limit, passed=False)
    if not suite(merged, "eval"):
        return Rule("merge_cost", "no evaluation rows to measure the merge on", limit=limit)
    found = gain({"challenger": merged, "live": live}, "live", "eval", "loss", settings).negative
    text = f"nats a token lost by merging: {said(found)}; its upper end must not lie above {limit:g}"
    return Rule("merge_cost", text, *ends(found), limit, found.high <= limit)


def _verdict(rules: Sequence[Rule], summary: str) -> Verdict:
    by_name = {rule.name: rule for rule in rules}
    failed = [r.text for r in rules if r.passed is False]
    missing = [r.text for r in rules if r.passed is None]
    if "enough_rows" in by_name and by_name["enough_rows"].passed is None:
        failed = []  # too few rows to fail anything on
    if failed:
        return Verdict("refuse", "refused: " + "; ".join(failed), tuple(rules))
    if missing:
        return Verdict("insufficient evidence", "insufficient evidence: " + "; ".join(missing), tuple(rules))
    return Verdict("pass", f"passed {len(rules)} rules: {summary}", tuple(rules))


def _summary(scores: Scores, settings: EvaluateConfig) -> str:
    metric = metric_of(scores, settings)
    try:
        return "; ".join(
            f"{unit(metric)} against the {rival} {said(gain(scores, rival, 'eval', metric, settings))}"
            for rival in ("base", "champion", "anchor")
            if rival in scores
        )
    except ValueError:
        return ""
