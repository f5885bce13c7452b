"""Decide on a challenger: pass, refuse, or insufficient evidence, with every rule behind the decision.

`evaluate` decides on the unmerged 4-bit model with its adapter, `merge_adapter` on the merged form. Both gates share
one set of rules (`rules/`); what was forgotten is judged on the form that ships alone. A rule passes, fails, or lacks
evidence; a verdict passes only where every rule passes. These are pure functions of the scores of rows and the
settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core.errors import QualityRefused
from qlora_retrain.core.outcome import Number, StepResult
from qlora_retrain.evaluation.metrics.suite_metrics import compute_metrics as compute_metrics
from qlora_retrain.evaluation.metrics.suite_metrics import compute_suite_metrics as compute_suite_metrics
from qlora_retrain.evaluation.metrics.suite_metrics import metrics_table as metrics_table
from qlora_retrain.evaluation.rows import RowScore, count_prompts
from qlora_retrain.evaluation.rules import slice_rules, suite_rules
from qlora_retrain.evaluation.rules.comparison import (
    Scores,
    display_name,
    gain_interval,
    primary_metric,
    rows_of_suite,
)
from qlora_retrain.evaluation.rules.rule_result import RuleResult as RuleResult
from qlora_retrain.evaluation.rules.rule_result import format_interval
from qlora_retrain.evaluation.rules.rule_result import rules_table as rules_table

__all__ = [
    "RuleResult",
    "Verdict",
    "apply_rules",
    "compute_metrics",
    "compute_suite_metrics",
    "merge_cost",
    "metrics_table",
    "primary_metric",
    "rules_table",
]

Decision = Literal["pass", "refuse", "insufficient evidence"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on a challenger, as a word, a sentence and the rules behind it."""

    decision: Decision
    sentence: str
    rules: tuple[RuleResult, ...]

    def rules_as_json(self) -> list[dict[str, Any]]:
        """Return the rules as `evaluation.json` and `certificate.json` hold them."""
        return [asdict(rule) for rule in self.rules]

    def to_step_result(self, numbers: Mapping[str, Number]) -> StepResult:
        """Return the step's report; it is a refusal unless every rule passed."""
        refused = None if self.decision == "pass" else QualityRefused(self.sentence)
        return StepResult({"verdict": self.decision, **numbers}, refused)


def apply_rules(
    scores: Scores, settings: EvaluateConfig, extra: Sequence[RuleResult] = (), *, is_final: bool = True
) -> Verdict:
    """Apply every rule to the contestants' scores.

    Args:
        scores: `base`, `challenger` and, where there are any, `champion` and `anchor`; rows of the suites `eval`,
            `golden` and `reference`.
        settings: The limits.
        extra: Rules that a step has applied itself; they count like the others.
        is_final: Whether the challenger is the form that ships; of any other, forgetting is only reported.
    """
    # With a loss that is not finite, or with too few prompts, no comparison means anything. Then only this result and
    # the step's own rules count.
    non_finite = sorted(name for name, rows in scores.items() if not all(math.isfinite(s.loss_nats) for s in rows))
    if non_finite:
        text = f"{', '.join(non_finite)}: some rows have a loss that is not finite"
        return _decide([RuleResult("finite_scores", text, passed=False), *extra], "")
    rows, limit = rows_of_suite(scores["challenger"], "eval"), settings.min_prompts
    prompts = count_prompts(rows)
    text = f"{len(rows)} evaluation rows of {prompts} different prompts"
    if prompts < limit:
        text += f"; at least {limit} different prompts are needed (evaluate.min_prompts)"
        return _decide([RuleResult("enough_prompts", text, prompts, limit=limit), *extra], "")

    results = [RuleResult("enough_prompts", text, prompts, limit=limit, passed=True)]
    results += suite_rules.apply(scores, settings, is_final=is_final)
    results += slice_rules.apply(scores, settings, slice_rules.compare_slices(scores, settings))
    return _decide([*results, *extra], _summarize_gains(scores, settings))


def merge_cost(
    unmerged: Sequence[RowScore], merged: Sequence[RowScore], limit: float, settings: EvaluateConfig
) -> RuleResult:
    """Check that merging costs at most `limit` nats per token on the evaluation rows."""
    if not all(math.isfinite(s.loss_nats) for s in (*unmerged, *merged)):
        text = "the loss of the merged form is not finite on some rows"
        return RuleResult("merge_cost", text, limit=limit, passed=False)
    if not rows_of_suite(merged, "eval"):
        return RuleResult("merge_cost", "there are no evaluation rows to measure the cost of merging on", limit=limit)

    # The merged form takes the challenger's place, so that its loss against the unmerged one is a negated gain.
    scores = {"challenger": merged, "unmerged": unmerged}
    cost = gain_interval(scores, "unmerged", "eval", "loss", settings).negated
    text = f"nats per token lost by merging: {format_interval(cost)}; its upper end must not lie above {limit:g}"
    return RuleResult.from_interval("merge_cost", text, cost, limit, cost.high <= limit)


def _decide(rules: Sequence[RuleResult], gains: str) -> Verdict:
    """Combine the rules; `gains` describes the challenger in the sentence of a verdict that passes."""
    by_name = {rule.name: rule for rule in rules}
    failed = [r.text for r in rules if r.passed is False]
    undecided = [r.text for r in rules if r.passed is None]

    # With too few prompts nothing can have failed, not even a rule of the step's own.
    if "enough_prompts" in by_name and by_name["enough_prompts"].passed is None:
        failed = []
    # One failed rule refuses, even where others lack evidence.
    if failed:
        return Verdict("refuse", "refused: " + "; ".join(failed), tuple(rules))
    if undecided:
        return Verdict("insufficient evidence", "insufficient evidence: " + "; ".join(undecided), tuple(rules))
    # A person must not take a rule that could not be applied for one that was passed.
    not_measured = [r.text for r in rules if not r.is_measured]
    text = f"passed {len(rules) - len(not_measured)} rules: {gains}"
    return Verdict("pass", "; ".join([text, *not_measured]), tuple(rules))


def _summarize_gains(scores: Scores, settings: EvaluateConfig) -> str:
    """Describe the challenger's gain over each rival; empty where the primary metric is defined for no row."""
    metric = primary_metric(scores, settings)
    # The gains only complete a sentence, and a rule reports missing values.
    try:
        return "; ".join(
            f"{display_name(metric)} against the {rival} "
            f"{format_interval(gain_interval(scores, rival, 'eval', metric, settings))}"
            for rival in ("base", "champion", "anchor")
            if rival in scores
        )
    except ValueError:
        return ""
