"""The rules over slices: none may be surely broken, and none below its floor. Of many slices each must be surer.

With k slices of enough rows an interval's confidence is 1 - (1 - confidence) / k (Bonferroni), so that a challenger
like its rival is refused for a slice no more often than by one rule. A slice is broken where the challenger is surely
worse there and the measured loss is above a limit; to ask that it be surely worse by more than the limit would find
nothing in slices of a dozen rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules.comparison import Scores, gain, known, metric_of, suite, unit
from qlora_retrain.evaluation.rules.comparison import value as value_of
from qlora_retrain.evaluation.rules.rule import Rule
from qlora_retrain.evaluation.stats import Interval

_NAMED = 3  # slices told by name in a sentence


@dataclass(frozen=True, slots=True)
class Slice:
    """How the challenger does on the rows of one slice.

    Attributes:
        name: E.g. `label=refund`.
        rows: Evaluation rows in it.
        value: The challenger's primary metric there; a loss is in nats a token.
        gain: Against `against`, with its widened interval; None where there are too few rows to judge.
        against: `champion`, or `base` where there is none.
    """

    name: str
    rows: int
    value: float
    against: str
    gain: Interval | None

    def as_json(self) -> dict[str, Any]:
        """The slice as `evaluation.json` holds it."""
        return asdict(self)


def measure(scores: Scores, settings: EvaluateConfig) -> list[Slice]:
    """Every slice of the evaluation rows, the worst first; those with too few rows last."""
    metric = metric_of(scores, settings)
    rows = [row for row in suite(scores["challenger"], "eval") if known(row, metric)]
    counts = Counter(name for row in rows for name in row.slices)
    judged = [name for name, count in counts.items() if count >= settings.min_slice_rows]
    confidence = 1 - (1 - settings.confidence) / max(1, len(judged))
    rival = "champion" if "champion" in scores else "base"
    found = []
    for name, count in counts.items():
        inside = [row for row in rows if name in row.slices]
        seen = None
        if name in judged:
            ids = {row.id for row in inside}
            seen = gain(scores, rival, "eval", metric, settings, within=ids, confidence=confidence)
        found.append(Slice(name, count, _mean(inside, metric), rival, seen))
    return sorted(found, key=lambda s: (s.gain is None, s.gain.value if s.gain else 0.0, s.name))


def all_of(scores: Scores, settings: EvaluateConfig, slices: Sequence[Slice]) -> Iterator[Rule]:
    """The rules over slices that the line has."""
    metric = metric_of(scores, settings)
    if settings.max_slice_loss is not None and slices:
        yield _none_broken(slices, metric, settings.max_slice_loss, settings.min_slice_rows)
    if settings.slice_floor is None and not settings.slice_floors:
        return
    if metric == "loss":
        yield Rule("slice_floors", "a loss has no floor; name another evaluate.primary, or set no floor for slices")
        return
    if settings.slice_floor is not None:
        yield _floor(slices, settings.slice_floor, settings.min_slice_rows)
    by_name = {s.name: s for s in slices}
    for name, limit in settings.slice_floors.items():
        yield _named_floor(name, by_name.get(name), limit, settings.min_slice_rows)


def _none_broken(slices: Sequence[Slice], metric: str, limit: float, least: int) -> Rule:
    judged = [s for s in slices if s.gain is not None]
    if not judged:
        return Rule("slices", f"no slice has {least} rows (evaluate.min_slice_rows), so none was judged", limit=limit)
    broken = [s for s in judged if s.gain and s.gain.high < 0 and s.gain.negative.value > limit]
    worst = judged[0]
    assert worst.gain is not None
    lost = worst.gain.negative
    shown = broken[:_NAMED] or [worst]
    named = "; ".join(f"{s.name}: {s.gain.negative.value:+.4f} (at least {s.gain.negative.low:+.4f}) on {s.rows} rows"
                      for s in shown if s.gain)  # fmt: skip
    text = f"{unit(metric)} lost to the {worst.against} in the worst of {len(judged)} slices: {named}"
    text += f"; none may be surely worse, by more than {limit:g}"
    if len(judged) < len(slices):
        text += f"; {len(slices) - len(judged)} slices with fewer than {least} rows were not judged"
    return Rule("slices", text, lost.value, lost.low, lost.high, limit, not broken)


def _floor(slices: Sequence[Slice], limit: float, least: int) -> Rule:
    judged = [s for s in slices if s.rows >= least]
    if not judged:
        return Rule("slice_floor", f"a floor for slices is set, but none has {least} rows", limit=limit)
    low = sorted((s for s in judged if s.value < limit), key=lambda s: s.value)
    worst = min(judged, key=lambda s: s.value)
    named = ", ".join(f"{s.name} {s.value:.4f} on {s.rows} rows" for s in low[:_NAMED] or [worst])
    text = f"{len(low)} of {len(judged)} slices lie below {limit:g}; the worst: {named}"
    return Rule("slice_floor", text, worst.value, limit=limit, passed=not low)


def _named_floor(name: str, found: Slice | None, limit: float, least: int) -> Rule:
    rows = found.rows if found else 0
    rule = f"slice_floor {name}"
    if found is None or rows < least:
        return Rule(rule, f"{name} has {rows} evaluation rows; at least {least} are needed", limit=limit)
    return Rule(rule, f"{name}: {found.value:.4f} on {rows} rows; the floor is {limit:g}", found.value, limit=limit,
                passed=found.value >= limit)  # fmt: skip


def _mean(rows: Sequence[RowScore], metric: str) -> float:
    if metric == "loss":
        return sum(row.loss_nats for row in rows) / max(1, sum(row.tokens for row in rows))
    return sum(value_of(row, metric) for row in rows) / len(rows)
