"""Collect the results of an evaluation and write them as `evaluation.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from components.evaluate.intruders import LayerIntruders
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import bootstrap, drift
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.drift import Drift
from qlora_retrain.evaluation.metrics.suite_metrics import MetricValues, compute_suite_metrics
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import slice_rules, suite_rules
from qlora_retrain.evaluation.rules.comparison import primary_metric
from qlora_retrain.evaluation.rules.rule_result import RuleResult
from qlora_retrain.evaluation.rules.slice_rules import SliceResult
from qlora_retrain.evaluation.verdict import Verdict

SUITES = ("eval", "golden", "reference")


@dataclass(slots=True)
class EvaluationResult:
    """The results of an evaluation, filled in step by step.

    Attributes:
        answers: Suite → row id → the true answer.
        scores: Contestant → its score on each row.
        completions: Contestant → row id → its completion; empty where it generated none.
        metrics: Suite → contestant → metrics.
        slices: The challenger on every slice, the worst first.
        differences: The challenger against each contestant, over whole suites.
        drifts: The drift of the data from the champion's; None: there is no champion, or nothing to compare.
        train_eval_gap: The evaluation loss minus that of training rows, in nats per token; empty without training rows.
        intruders: The intruder dimensions of each adapted matrix.
        training: The adapter's `steps`, the step `resumed_at`, and the `trained_steps` of the attempt that made it.
    """

    answers: dict[str, dict[str, str]]
    scores: dict[str, list[RowScore]] = field(default_factory=dict)
    completions: dict[str, dict[str, str]] = field(default_factory=dict)
    metrics: dict[str, dict[str, MetricValues]] = field(default_factory=dict)
    slices: list[SliceResult] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    drifts: list[Drift] | None = None
    train_eval_gap: dict[str, float] = field(default_factory=dict)
    intruders: list[LayerIntruders] = field(default_factory=list)
    training: dict[str, int] = field(default_factory=dict)

    @property
    def rival(self) -> str:
        """The contestant that the challenger is compared with in detail."""
        return "champion" if "champion" in self.scores else "base"

    def compute_metrics(self, config: EvaluateConfig) -> None:
        """Fill in the metrics of the suites, the differences and the slices."""
        for suite in SUITES:
            self.metrics[suite] = compute_suite_metrics(self.scores, suite, config, self.answers[suite])

        rows = [score for scores in self.scores.values() for score in scores]
        # Where a loss is not finite, the report shows no comparison.
        if rows and all(math.isfinite(score.loss_nats) for score in rows):
            self.differences = suite_rules.compare_contestants(self.scores, config)
            self.slices = slice_rules.compare_slices(self.scores, config)

    def check_train_eval_gap(self, config: EvaluateConfig) -> RuleResult | None:
        """Apply the rule on overfitting, where the line has one."""
        limit = config.max_train_eval_gap_nats
        if limit is None:
            return None
        if not self.train_eval_gap:
            text = "max_train_eval_gap_nats is set, but no training rows were scored"
            return RuleResult("train_eval_gap", text, limit=limit)
        # The rule uses the measured gap and not an end of its interval, because the interval of unpaired rows is wide.
        gap, low, high = (self.train_eval_gap[name] for name in ("gap", "gap_low", "gap_high"))
        text = f"loss on evaluation rows minus that on training rows: {gap:+.4f} nats per token; the limit is {limit:g}"
        return RuleResult("train_eval_gap", text, gap, low, high, limit, gap <= limit)

    def trained_steps(self) -> RuleResult | None:
        """Report where the adapter comes from; None where one attempt trained all of it.

        A resumed run is as good as any, so nothing is refused. But nobody saw the steps that a checkpoint stands for,
        and an adapter of which no step was seen is shown as such.
        """
        steps, resumed_at, trained = (self.training.get(n, 0) for n in ("steps", "resumed_at", "trained_steps"))
        if not resumed_at:
            return None
        text = f"{trained} of the adapter's {steps} steps were trained by the attempt that made it"
        text += f", the others are checkpoint-{resumed_at}'s"
        return RuleResult("trained_steps", text, trained, limit=steps, passed=True, is_measured=trained > 0)

    def as_json(self, config: EvaluateConfig, verdict: Verdict) -> dict[str, Any]:
        """Return the content of `evaluation.json`, which holds no row's text."""
        return {
            "verdict": verdict.decision,
            "sentence": verdict.sentence,
            "metric": primary_metric(self.scores, config),
            "contestants": self.metrics["eval"],
            **{suite: self.metrics[suite] for suite in SUITES[1:] if self.metrics[suite]},
            "rules": verdict.rules_as_json(),
            "differences": self.differences,
            "slices": [s.as_json() for s in self.slices],
            "drift": None if self.drifts is None else drift.as_json(self.drifts),
            "train_eval_gap": self.train_eval_gap or None,
            "training": self.training or None,
            "intruder_dimensions": [asdict(layer) for layer in self.intruders],
            "settings": config.model_dump(mode="json"),
        }


def compute_train_eval_gap(
    eval_scores: Sequence[RowScore], train_scores: Sequence[RowScore], config: EvaluateConfig
) -> dict[str, float]:
    """Compute how much more an evaluation token costs than a training token; empty where either has no loss.

    The two sets of rows differ, so the rows cannot be paired. The ends combine those of both intervals, which makes
    the interval wider than necessary.
    """
    intervals = []
    for scores in (eval_scores, train_scores):
        tokens = [score.tokens for score in scores]
        if not sum(tokens) or not all(math.isfinite(score.loss_nats) for score in scores):
            return {}
        losses = [score.loss_nats for score in scores]
        prompts = [score.prompt for score in scores]
        intervals.append(bootstrap.ratio_interval(losses, tokens, BootstrapSettings.from_config(config), prompts))

    # The widest difference that the two intervals allow.
    eval_loss, train_loss = intervals
    return {
        "gap": eval_loss.value - train_loss.value,
        "gap_low": eval_loss.low - train_loss.high,
        "gap_high": eval_loss.high - train_loss.low,
        "eval_loss": eval_loss.value,
        "train_loss": train_loss.value,
        "train_rows": len(train_scores),
    }
