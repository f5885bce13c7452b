"""The rules that decide whether a challenger may ship: pure functions of per-row scores and the config.

`evaluate` applies them to the live 4-bit model with its adapter, `merge_adapter` to the merged form, so both gates are
one set of rules. A rule passes, fails, or cannot be judged for want of evidence; a verdict passes only where every rule
does. The metric is the accuracy for a label task (higher is better), else the loss a token (lower is better).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_retrain import stats
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.errors import QualityRefused
from qlora_retrain.outcome import Number, Report
from qlora_retrain.scoring import RowScore
from qlora_retrain.stats import Interval

Metric = Literal["accuracy", "loss"]
Scores = Mapping[str, Sequence[RowScore]]  # by contestant: the same rows in the same order
Word = Literal["pass", "refuse", "insufficient evidence"]

_MIN_GOLDEN_ROWS = 10  # fewer are reported, but decide nothing
_MIN_PASSAGES = 2  # one alone has no interval


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


def metric_of(scores: Scores) -> Metric:
    """`accuracy` where the rows were answered with labels, else `loss`."""
    return "accuracy" if any(s.correct is not None for s in scores["challenger"]) else "loss"


def judge(scores: Scores, settings: EvaluateConfig, extra: Sequence[Rule] = ()) -> Verdict:
    """Apply every rule to the contestants' scores.

    Args:
        scores: `base`, `challenger` and, where there is one, `champion`; rows of the suites `eval`, `golden` and
            `reference`.
        settings: The limits.
        extra: Rules that a step adds, judged with the others.
    """
    metric = metric_of(scores)
    if broken := sorted(name for name, rows in scores.items() if not all(math.isfinite(s.loss_nats) for s in rows)):
        rule = Rule("finite_scores", f"{', '.join(broken)}: some rows have a loss that is not finite", passed=False)
        return _verdict([rule, *extra], "")
    rows = len(_suite(scores["challenger"], "eval"))
    if rows < max(1, settings.min_rows):
        rule = Rule("enough_rows", f"{rows} evaluation rows; at least {settings.min_rows} are needed", rows,
                    limit=settings.min_rows)  # fmt: skip
        return _verdict([rule, *extra], "")
    rules = [Rule("enough_rows", f"{rows} evaluation rows", rows, limit=settings.min_rows, passed=True)]
    rules.append(_gain_over_base(scores, metric, settings))
    rules.append(_loss_to_champion(scores, metric, settings))
    if settings.min_accuracy is not None:
        rules.append(_floor(scores, metric, settings, settings.min_accuracy))
    if len(_suite(scores["challenger"], "golden")) >= _MIN_GOLDEN_ROWS:
        rules.append(_golden(scores, metric, settings))
    if settings.max_forgetting_nats is not None:
        rules.append(_forgetting(scores, settings, settings.max_forgetting_nats))
    return _verdict([*rules, *extra], _summary(scores, metric, settings))


def gain(scores: Scores, over: str, suite: str, metric: Metric, settings: EvaluateConfig) -> Interval:
    """How much better the challenger is than another contestant on a suite, paired by row; above 0 is better."""
    ours, theirs = _paired(scores["challenger"], scores[over], suite)
    if metric == "accuracy":
        differences: list[float] = [bool(a.correct) - bool(b.correct) for a, b in zip(ours, theirs, strict=True)]
        return _interval(differences, None, settings)
    # One denominator for both: where tokenizers differ, a loss per own token would compare different units.
    differences = [b.loss_nats - a.loss_nats for a, b in zip(ours, theirs, strict=True)]
    return _interval(differences, [a.tokens for a in ours], settings)


def merge_cost(live: Sequence[RowScore], merged: Sequence[RowScore], limit: float, settings: EvaluateConfig) -> Rule:
    """The rule that merging must not cost more than `limit` nats a token on the evaluation rows."""
    if not all(math.isfinite(s.loss_nats) for s in (*live, *merged)):
        return Rule("merge_cost", "the merged form's loss is not finite on some rows", limit=limit, passed=False)
    if not _suite(merged, "eval"):
        return Rule("merge_cost", "no evaluation rows to measure the merge on", limit=limit)
    found = gain({"challenger": merged, "live": live}, "live", "eval", "loss", settings).negative
    text = f"nats a token lost by merging: {_said(found)}; its upper end must not lie above {limit:g}"
    return Rule("merge_cost", text, *_ends(found), limit, found.high <= limit)


def measure(rows: Sequence[RowScore], settings: EvaluateConfig, answers: Mapping[str, str]) -> dict[str, float | None]:
    """A contestant's numbers on one suite, with intervals; empty where there are no rows.

    Args:
        rows: Of one contestant and one suite.
        settings: For the intervals.
        answers: The true answer of each row id, for macro-F1.
    """
    if not rows:
        return {}
    if not all(math.isfinite(s.loss_nats) for s in rows) or not sum(s.tokens for s in rows):
        return {"loss": None, "perplexity": None, "rows": len(rows)}
    loss = _interval([s.loss_nats for s in rows], [s.tokens for s in rows], settings)
    found: dict[str, float | None] = {"loss": loss.value, "loss_low": loss.low, "loss_high": loss.high}
    found["perplexity"] = math.exp(min(loss.value, 700.0))
    labelled = [s for s in rows if s.predicted is not None]
    if labelled:
        accuracy = _interval([float(bool(s.correct)) for s in labelled], None, settings)
        found |= {"accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
        found["macro_f1"] = stats.macro_f1([answers[s.id] for s in labelled], [str(s.predicted) for s in labelled])
    return found | {"rows": len(rows)}


def measure_suite(
    scores: Scores, suite: str, settings: EvaluateConfig, answers: Mapping[str, str]
) -> dict[str, dict[str, float | None]]:
    """`measure` of every contestant that has rows in that suite."""
    found = {name: measure(_suite(rows, suite), settings, answers) for name, rows in scores.items()}
    return {name: numbers for name, numbers in found.items() if numbers}


def rules_table(rules: Sequence[Rule]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows for the report."""
    word = {True: "passed", False: "failed", None: "not enough evidence"}
    rows = [
        [r.name.replace("_", " "), word[r.passed], _shown(r.value), _span(r.low, r.high), _shown(r.limit), r.text]
        for r in rules
    ]
    return ["rule", "", "value", "interval", "limit", "what was found"], rows


def numbers_table(measured: Mapping[str, Mapping[str, float | None]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of contestants against metrics for the report."""
    rows = []
    for name, n in measured.items():
        loss = f"{_shown(n.get('loss'))} {_span(n.get('loss_low'), n.get('loss_high'))}".strip()
        accuracy = f"{_shown(n.get('accuracy'))} {_span(n.get('accuracy_low'), n.get('accuracy_high'))}".strip()
        cells = [_shown(n.get("perplexity")), accuracy, _shown(n.get("macro_f1")), _shown(n.get("rows"))]
        rows.append([name, loss, *cells])
    return ["contestant", "loss, nats a token", "perplexity", "accuracy", "macro-F1", "rows"], rows


def _gain_over_base(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Rule:
    found, limit = gain(scores, "base", "eval", metric, settings), settings.min_gain_over_base
    passed = found.low > limit
    text = f"{_unit(metric)} against the base: {_said(found)}; its lower end must lie above {limit:g}"
    return Rule("gain_over_base", text + _coin(scores, "base", metric), *_ends(found), limit, passed)


def _loss_to_champion(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Rule:
    limit = settings.max_loss_to_champion
    if "champion" not in scores:
        if settings.first_release:
            return Rule("loss_to_champion", "no champion yet; first_release allows it", limit=limit, passed=True)
        text = "no champion to compare with; set evaluate.first_release: true to allow the first version"
        return Rule("loss_to_champion", text, limit=limit)
    found = gain(scores, "champion", "eval", metric, settings).negative
    text = f"{_unit(metric)} lost to the champion: {_said(found)}; its upper end must not lie above {limit:g}"
    text += _coin(scores, "champion", metric)
    return Rule("loss_to_champion", text, *_ends(found), limit, found.high <= limit)


def _floor(scores: Scores, metric: Metric, settings: EvaluateConfig, limit: float) -> Rule:
    if metric != "accuracy":
        return Rule("accuracy_floor", "min_accuracy is set, but a text task has no accuracy", limit=limit)
    rows = _suite(scores["challenger"], "eval")
    found = _interval([float(bool(s.correct)) for s in rows], None, settings)
    return Rule("accuracy_floor", f"accuracy {_said(found, sign='')}; the floor is {limit:g}", *_ends(found), limit,
                found.value >= limit)  # fmt: skip


def _golden(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Rule:
    rival = "champion" if "champion" in scores else "base"
    found = gain(scores, rival, "golden", metric, settings).negative
    text = f"{_unit(metric)} lost to the {rival} on the golden rows: {_said(found)}; it must not lie wholly above 0"
    return Rule("golden", text, *_ends(found), 0.0, found.low <= 0.0)


def _forgetting(scores: Scores, settings: EvaluateConfig, limit: float) -> Rule:
    passages = len(_suite(scores["challenger"], "reference"))
    if passages < _MIN_PASSAGES:
        text = f"max_forgetting_nats is set, but there are {passages} passages of reference text; set "
        return Rule("forgetting", text + "sources.reference_data to general text", limit=limit)
    found = gain(scores, "base", "reference", "loss", settings).negative
    text = f"nats a token lost on reference text: {_said(found)}; its upper end must not lie above {limit:g}"
    return Rule("forgetting", text, *_ends(found), limit, found.high <= limit)


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


def _summary(scores: Scores, metric: Metric, settings: EvaluateConfig) -> str:
    rivals = [name for name in ("base", "champion") if name in scores]
    return "; ".join(
        f"{_unit(metric)} against the {rival} {_said(gain(scores, rival, 'eval', metric, settings))}"
        for rival in rivals
    )


def _coin(scores: Scores, rival: str, metric: Metric) -> str:
    if metric != "accuracy":
        return ""
    ours, theirs = _paired(scores["challenger"], scores[rival], "eval")
    p = stats.mcnemar([bool(s.correct) for s in ours], [bool(s.correct) for s in theirs])
    return f" (exact McNemar p {p:.3g})"


def _paired(ours: Sequence[RowScore], theirs: Sequence[RowScore], suite: str) -> tuple[list[RowScore], list[RowScore]]:
    first, second = _suite(ours, suite), _suite(theirs, suite)
    if [s.id for s in first] != [s.id for s in second]:
        raise ValueError(f"contestants were scored on different {suite} rows: {len(first)} and {len(second)}")
    return first, second


def _suite(rows: Sequence[RowScore], suite: str) -> list[RowScore]:
    return [s for s in rows if s.suite == suite]


def _interval(values: Sequence[float], weights: Sequence[float] | None, settings: EvaluateConfig) -> Interval:
    return stats.ratio_interval(
        values, weights, confidence=settings.confidence, samples=settings.bootstrap_samples, seed=settings.seed
    )


def _ends(found: Interval) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def _unit(metric: Metric) -> str:
    return "accuracy" if metric == "accuracy" else "nats a token"


def _said(found: Interval, sign: str = "+") -> str:
    return f"{found.value:{sign}.4f} ({found.low:{sign}.4f} to {found.high:{sign}.4f})"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"({low:.4g} to {high:.4g})"
