"""Apply the rules over slices: no slice may be broken, and none may be below its floor.

With k slices of enough prompts, each interval has the confidence 1 - (1 - confidence) / k (Bonferroni). So a challenger
that equals its rival is refused for a slice no more often than by a single rule.

A slice is broken where the challenger is certainly worse there and the measured loss is above a limit. If it had to be
certainly worse by more than the limit, nothing would be detected in slices of a dozen rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import RowScore, count_prompts, describe_counts
from qlora_retrain.evaluation.rules.comparison import (
    Metric,
    Scores,
    comparable_pairs,
    display_name,
    gain_interval,
    has_metric,
    metric_value,
    primary_metric,
    rows_of_suite,
)
from qlora_retrain.evaluation.rules.rule_result import RuleResult
from qlora_retrain.evaluation.stats import Interval

_MAX_SLICES_IN_SENTENCE = 3


@dataclass(frozen=True, slots=True)
class SliceResult:
    """How the challenger does on the rows of one slice.

    Attributes:
        name: The slice, e.g. `label=refund`.
        rows: The number of evaluation rows in it.
        prompts: The number of different prompts that they have.
        value: The challenger's primary metric there; a loss is in nats per token.
        gain: The gain over `against` with its widened interval; None where the slice has too few prompts.
        against: The rival: `champion`, or `base` where there is no champion.
    """

    name: str
    rows: int
    prompts: int
    value: float
    against: str
    gain: Interval | None

    @property
    def size(self) -> str:
        """Return the number of its rows, and that of their prompts where it differs, in words."""
        return describe_counts(self.rows, self.prompts)

    def as_json(self) -> dict[str, Any]:
        """Return the slice as `evaluation.json` holds it."""
        return asdict(self)


def compare_slices(scores: Scores, settings: EvaluateConfig) -> list[SliceResult]:
    """Compare every slice of the evaluation rows with the rival; the worst first, those with too few prompts last."""
    metric = primary_metric(scores, settings)
    rival = "champion" if "champion" in scores else "base"
    rows = [row for row in rows_of_suite(scores["challenger"], "eval") if has_metric(row, metric)]
    names = dict.fromkeys(name for row in rows for name in row.slices)
    # Rows that the rival's own template refuses cannot be compared.
    pairs = comparable_pairs(scores, rival, "eval", metric)
    comparable = Counter(name for name, _ in {(name, row.prompt) for row, _ in pairs for name in row.slices})
    large_enough = [name for name in names if comparable[name] >= settings.min_slice_prompts]

    # Bonferroni: the chance of a false alarm is shared among the slices.
    confidence = 1 - (1 - settings.confidence) / max(1, len(large_enough))
    results = []
    for name in names:
        slice_rows = [row for row in rows if name in row.slices]
        # A slice with too few prompts is shown with its value, but not compared.
        gain = None
        if name in large_enough:
            ids = {row.id for row in slice_rows}
            gain = gain_interval(scores, rival, "eval", metric, settings, row_ids=ids, confidence=confidence)
        value, prompts = _mean_metric(slice_rows, metric), count_prompts(slice_rows)
        results.append(SliceResult(name, len(slice_rows), prompts, value, rival, gain))
    return sorted(results, key=lambda s: (s.gain is None, s.gain.value if s.gain else 0.0, s.name))


def apply(scores: Scores, settings: EvaluateConfig, slices: Sequence[SliceResult]) -> Iterator[RuleResult]:
    """Apply the rules over slices that the line's settings ask for."""
    metric = primary_metric(scores, settings)
    if settings.max_slice_regression is not None and slices:
        yield _no_broken_slice(slices, metric, settings.max_slice_regression, settings.min_slice_prompts)

    if settings.slice_floor is None and not settings.slice_floors:
        return
    if metric == "loss":
        text = "a loss has no floor; name another evaluate.primary_metric, or set no floor for slices"
        yield RuleResult("slice_floors", text)
        return

    if settings.slice_floor is not None:
        yield _common_floor(slices, settings.slice_floor, settings.min_slice_prompts)
    by_name = {s.name: s for s in slices}
    for name, limit in settings.slice_floors.items():
        yield _named_floor(name, by_name.get(name), limit, settings.min_slice_prompts)


def _no_broken_slice(slices: Sequence[SliceResult], metric: Metric, limit: float, min_prompts: int) -> RuleResult:
    """Check that the challenger is in no slice certainly worse and by more than the limit."""
    compared = [s for s in slices if s.gain is not None]
    if not compared:
        text = f"no slice has {min_prompts} different prompts (evaluate.min_slice_prompts), so none was compared"
        return RuleResult("slices", text, limit=limit)

    # `slices` has the worst first.
    broken = [s for s in compared if s.gain and s.gain.high < 0 and s.gain.negated.value > limit]
    worst = compared[0]
    # For mypy: every slice in `compared` has a gain.
    assert worst.gain is not None
    loss = worst.gain.negated
    listed = broken[:_MAX_SLICES_IN_SENTENCE] or [worst]
    descriptions = "; ".join(
        f"{s.name}: {s.gain.negated.value:+.4f} (at least {s.gain.negated.low:+.4f}) on {s.size}"
        for s in listed
        if s.gain
    )

    text = f"{display_name(metric)} lost to the {worst.against} in the worst of {len(compared)} slices: {descriptions}"
    text += f"; none may be certainly worse, by more than {limit:g}"
    if len(compared) < len(slices):
        text += f"; {len(slices) - len(compared)} slices with fewer than {min_prompts} different prompts were not "
        text += "compared"
    return RuleResult.from_interval("slices", text, loss, limit, not broken)


def _common_floor(slices: Sequence[SliceResult], limit: float, min_prompts: int) -> RuleResult:
    """Check the measured value of every slice of enough prompts against one floor."""
    large_enough = [s for s in slices if s.prompts >= min_prompts]
    if not large_enough:
        text = f"a floor for slices is set, but none has {min_prompts} different prompts (evaluate.min_slice_prompts)"
        return RuleResult("slice_floor", text, limit=limit)
    # The rule uses the measured value and not its lower end, so a slice exactly at the floor mostly passes.
    below = sorted((s for s in large_enough if s.value < limit), key=lambda s: s.value)
    worst = min(large_enough, key=lambda s: s.value)
    listed = below[:_MAX_SLICES_IN_SENTENCE] or [worst]
    descriptions = ", ".join(f"{s.name} {s.value:.4f} on {s.size}" for s in listed)
    text = f"{len(below)} of {len(large_enough)} slices lie below {limit:g}; the worst: {descriptions}"
    return RuleResult("slice_floor", text, worst.value, limit=limit, passed=not below)


def _named_floor(name: str, result: SliceResult | None, limit: float, min_prompts: int) -> RuleResult:
    """Check a slice that the line names against its own floor; there, too few prompts are missing evidence."""
    rule = f"slice_floor {name}"
    if result is None or result.prompts < min_prompts:
        text = f"{name} has evaluation rows of {result.prompts if result else 0} different prompts; at least "
        return RuleResult(rule, f"{text}{min_prompts} are needed (evaluate.min_slice_prompts)", limit=limit)
    text = f"{name}: {result.value:.4f} on {result.size}; the floor is {limit:g}"
    return RuleResult(rule, text, result.value, limit=limit, passed=result.value >= limit)


def _mean_metric(rows: Sequence[RowScore], metric: Metric) -> float:
    if metric == "loss":  # a mean over tokens, not over rows
        return sum(row.loss_nats for row in rows) / max(1, sum(row.tokens for row in rows))
    return sum(metric_value(row, metric) for row in rows) / len(rows)
