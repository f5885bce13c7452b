"""Everything that an evaluation found, and how it is written down in `evaluation.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from components.evaluate.intruders import Layer
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import drift, stats, verdict
from qlora_retrain.evaluation.drift import Drift
from qlora_retrain.evaluation.metrics.measures import Numbers
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import overall, sliced
from qlora_retrain.evaluation.rules.rule import Rule
from qlora_retrain.evaluation.rules.sliced import Slice
from qlora_retrain.evaluation.verdict import Verdict

SUITES = ("eval", "golden", "reference")


@dataclass(slots=True)
class Found:
    """What was found so far.

    Attributes:
        answers: Suite → row id → the true answer.
        scores: Contestant → a score a row.
        written: Contestant → row id → what it wrote; empty where it was not asked to.
        measured: Suite → contestant → numbers.
        slices: The challenger on every slice, the worst first.
        differences: The challenger against each contestant, overall.
        drift: Of the data since the champion's; None: there is no champion, or nothing to compare.
        gap: Evaluation loss against that of training rows, in nats a token; empty where it was not measured.
        layers: Intruder dimensions by matrix.
    """

    answers: dict[str, dict[str, str]]
    scores: dict[str, list[RowScore]] = field(default_factory=dict)
    written: dict[str, dict[str, str]] = field(default_factory=dict)
    measured: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    drift: list[Drift] | None = None
    gap: dict[str, float] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)

    @property
    def rival(self) -> str:
        """Whom the challenger is compared with in detail."""
        return "champion" if "champion" in self.scores else "base"

    def measure(self, config: EvaluateConfig) -> None:
        """Fill in the numbers of the suites, the differences and the slices."""
        for suite in SUITES:
            self.measured[suite] = verdict.measure_suite(self.scores, suite, config, self.answers[suite])
        rows = [score for scores in self.scores.values() for score in scores]
        if rows and all(math.isfinite(score.loss_nats) for score in rows):
            self.differences = overall.differences(self.scores, config)
            self.slices = sliced.measure(self.scores, config)

    def gap_rule(self, config: EvaluateConfig) -> Rule | None:
        """The rule on overfitting, where the line has one."""
        limit = config.max_train_eval_gap
        if limit is None:
            return None
        if not self.gap:
            return Rule("train_eval_gap", "max_train_eval_gap is set, but no training rows were scored", limit=limit)
        value = self.gap["gap"]
        text = f"nats a token more on evaluation rows than on training rows: {value:+.4f}; the limit is {limit:g}"
        return Rule("train_eval_gap", text, value, self.gap["gap_low"], self.gap["gap_high"], limit, value <= limit)

    def document(self, config: EvaluateConfig, judged: Verdict) -> dict[str, Any]:
        """`evaluation.json`: no row's text is in it."""
        return {
            "verdict": judged.verdict,
            "sentence": judged.sentence,
            "metric": verdict.metric_of(self.scores, config),
            "contestants": self.measured["eval"],
            **{suite: self.measured[suite] for suite in SUITES[1:] if self.measured[suite]},
            "rules": judged.rules_as_json(),
            "differences": self.differences,
            "slices": [s.as_json() for s in self.slices],
            "drift": None if self.drift is None else drift.as_json(self.drift),
            "train_eval_gap": self.gap or None,
            "intruder_dimensions": [asdict(layer) for layer in self.layers],
            "settings": config.model_dump(mode="json"),
        }


def gap(evaluated: Sequence[RowScore], trained: Sequence[RowScore], config: EvaluateConfig) -> dict[str, float]:
    """How much more an evaluation token costs than one that was trained on; empty where either cannot be measured.

    The rows are different ones, so the ends are those of both intervals together: wider than need be.
    """
    both = []
    for rows in (evaluated, trained):
        tokens = [score.tokens for score in rows]
        if not sum(tokens) or not all(math.isfinite(score.loss_nats) for score in rows):
            return {}
        both.append(
            stats.ratio_interval(
                [score.loss_nats for score in rows],
                tokens,
                confidence=config.confidence,
                samples=config.bootstrap_samples,
                seed=config.seed,
            )
        )
    ours, theirs = both
    return {
        "gap": ours.value - theirs.value,
        "gap_low": ours.low - theirs.high,
        "gap_high": ours.high - theirs.low,
        "eval_loss": ours.value,
        "train_loss": theirs.value,
        "train_rows": len(trained),
    }
