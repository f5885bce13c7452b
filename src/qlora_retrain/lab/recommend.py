"""Say which settings to take: the cheapest that the rows cannot tell apart from the best, with how sure that is.

A cheaper point that is behind by more than the line's own margin (`evaluate.max_loss_to_champion`) is not taken, even
where few rows leave room for chance.
Two candidates are compared on the same rows with the same seeds; the interval counts prompts, over all seeds together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rows import count_prompts
from qlora_retrain.evaluation.rules.comparison import Metric, display_name, gain_interval, has_metric
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.lab.results import Candidate, interval_json, value_interval

# What a candidate costs, the most important first, and by which part a cost must be lower to count: the size of an
# adapter is exact, memory varies a little between runs, and time varies with what else the machine does.
COSTS = (("adapter_bytes", 0.0), ("peak_memory_mib", 0.05), ("training_seconds", 0.1))
_COST_WORDS = {
    "adapter_bytes": ("its adapter has {:,.2f} MiB instead of {:,.2f}", 2**20),
    "peak_memory_mib": ("training takes {:,.0f} MiB of memory instead of {:,.0f}", 1),
    "training_seconds": ("training takes {:,.0f} s instead of {:,.0f}", 1),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much better the best candidate is than another; None: they have no seed in common.

    Attributes:
        label: The other candidate.
        gain: Above 0 the best one is better, whatever the metric.
        cheaper_by: The cost at which the other one is cheaper; None: it is not.
    """

    label: str
    gain: Interval | None
    cheaper_by: str | None

    @property
    def is_worse(self) -> bool:
        """Whether the other one is certainly worse."""
        return self.gain is not None and self.gain.low > 0.0

    @property
    def is_within_chance(self) -> bool:
        """Whether the two were compared, and the difference may be chance."""
        return self.gain is not None and self.gain.low <= 0.0

    def is_behind_by_at_most(self, margin: float) -> bool:
        """Whether the measured difference is no larger than a margin."""
        return self.gain is not None and self.gain.value <= margin

    def as_json(self) -> dict[str, Any]:
        """Return what `lab.json` has of it."""
        verdict = "not compared" if self.gain is None else "worse" if self.is_worse else "within chance"
        return {
            "label": self.label,
            "gain": interval_json(self.gain),
            "verdict": verdict,
            "cheaper_by": self.cheaper_by,
        }


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Which candidate to take.

    Attributes:
        take: Its label.
        best: The label of the one with the best measured value.
        sentence: The answer.
        notes: What a person should know before acting on it.
        comparisons: The best one against every other, in the order of the table.
    """

    take: str
    best: str
    sentence: str
    notes: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


def ranked(candidates: Sequence[Candidate], metric: Metric, settings: EvaluateConfig) -> list[Candidate]:
    """Sort the candidates by their metric over all seeds, the best first, and of equal ones the smaller adapter."""
    sign = 1.0 if metric == "loss" else -1.0

    def order(candidate: Candidate) -> tuple[bool, float, float]:
        interval = value_interval(candidate.scores(candidate.seeds), metric, settings)
        return interval is None, sign * interval.value if interval else 0.0, candidate.mean("adapter_bytes") or 0.0

    return sorted(candidates, key=order)


def recommend(candidates: Sequence[Candidate], metric: Metric, settings: EvaluateConfig) -> Recommendation:
    """Return which of the candidates to take; they are sorted as `ranked` sorts them, and there is at least one."""
    best = candidates[0]
    comparisons = [_compare(best, rival, metric, settings) for rival in candidates[1:]]
    take = best
    for candidate, comparison in zip(candidates[1:], comparisons, strict=True):
        is_as_good = comparison.is_within_chance and comparison.is_behind_by_at_most(settings.max_loss_to_champion)
        if is_as_good and cheaper_by(candidate, take):
            take = candidate

    selected = next((c for c in comparisons if c.label == take.label), None)
    sentence = _sentence(best, take, selected, comparisons, metric, settings.max_loss_to_champion)
    notes = [*_notes_on_evidence(best, selected, metric), *_notes(candidates, take, metric, settings)]
    return Recommendation(take.label, best.label, sentence, tuple(notes), tuple(comparisons))


def cheaper_by(candidate: Candidate, rival: Candidate) -> str | None:
    """Return the first cost that differs, if the candidate has less of it; None if it has more, or no cost differs."""
    for name, tolerance in COSTS:
        ours, theirs = candidate.mean(name), rival.mean(name)
        if ours is None or theirs is None:
            continue
        if ours < theirs * (1.0 - tolerance):
            return name
        if theirs < ours * (1.0 - tolerance):
            return None
    return None


def _compare(best: Candidate, rival: Candidate, metric: Metric, settings: EvaluateConfig) -> Comparison:
    seeds = [seed for seed in best.seeds if seed in rival.seeds]
    cost = cheaper_by(rival, best)
    scores = {"challenger": best.scores(seeds), "rival": rival.scores(seeds)}
    if not any(has_metric(row, metric) for row in scores["challenger"]):
        return Comparison(rival.label, None, cost)
    return Comparison(rival.label, gain_interval(scores, "rival", "eval", metric, settings), cost)


def _sentence(
    best: Candidate,
    take: Candidate,
    selected: Comparison | None,
    comparisons: Sequence[Comparison],
    metric: Metric,
    margin: float,
) -> str:
    prompts = count_prompts(best.scores(best.seeds))
    if not comparisons:
        return f"Only {best.label} was measured, so there is nothing to compare it with."
    if selected is not None and selected.gain is not None:
        gain, name = selected.gain, display_name(metric)
        ahead = f"{best.label} is ahead by {gain.value:.4f} {name}, its interval is {gain.low:+.4f} to {gain.high:+.4f}"
        words, unit = _COST_WORDS[cost := cheaper_by(take, best) or COSTS[0][0]]
        price = words.format((take.mean(cost) or 0.0) / unit, (best.mean(cost) or 0.0) / unit)
        return (
            f"{take.label} is as good as {best.label} within what {prompts:,} prompts can show ({ahead}), and {price}: "
            f"take {take.label}."
        )
    equal = [c for c in comparisons if c.is_within_chance]
    if not equal:
        apart = [c.label for c in comparisons if c.gain is None]
        scope = f" but {'; '.join(apart)}, with which it has no seed in common" if apart else ""
        if len(apart) == len(comparisons):
            return f"{best.label} has the best value, and no seed in common with another point: take no conclusion."
        return (
            f"{best.label} is better than every other point{scope}, by more than chance on {prompts:,} prompts: take "
            "it."
        )
    rivals, why = "; ".join(c.label for c in equal), _why_not(equal, margin)
    if all(c.gain is not None and c.gain.value == 0.0 for c in equal):
        return f"{best.label} has the best value, as {rivals}. {why}: take {best.label}."
    return (
        f"{best.label} has the best value, but {prompts:,} prompts cannot tell it apart from {rivals}. {why}: take "
        f"{best.label}."
    )


def _why_not(equal: Sequence[Comparison], margin: float) -> str:
    """Return why none of the points that may be as good is taken."""
    if not any(comparison.cheaper_by for comparison in equal):
        return "None of these costs less"
    return (
        f"Those that cost less are behind by more than {margin:g} (evaluate.max_loss_to_champion), and more prompts "
        "would say whether that is chance"
    )


def _notes_on_evidence(best: Candidate, selected: Comparison | None, metric: Metric) -> list[str]:
    """Return how much is lost at most where a cheaper point is taken, since "as good as" is never proved."""
    if selected is None or selected.gain is None or selected.gain.high <= 0.0:
        return []
    most = f"{selected.gain.high:.4f} {display_name(metric)}"
    return [
        f"{selected.label} may still be worse than {best.label} by up to {most}; more prompts narrow that: a larger "
        "--judge-fraction, or more data."
    ]


def _notes(candidates: Sequence[Candidate], take: Candidate, metric: Metric, settings: EvaluateConfig) -> list[str]:
    notes = []
    seeds = {len(candidate.results) for candidate in candidates}
    spreads = [max(values) - min(values) for c in candidates if len(values := _seed_values(c)) > 1]
    if max(seeds) == 1:
        notes.append("One seed was trained; another may change the order, and --seeds 3 shows by how much.")
    elif spreads:
        notes.append(
            f"Between the seeds of one point the {display_name(metric)} differs by up to {max(spreads):.4f}; a smaller "
            "difference between points may be the seed's."
        )
    if len(seeds) > 1:
        notes.append("Some points have fewer seeds than others, as runs failed; points are compared on common seeds.")
    base = {"challenger": take.scores(take.seeds), "base": [r for result in take.results for r in result.base_scores]}
    if any(has_metric(row, metric) for row in base["challenger"]):
        gain = gain_interval(base, "base", "eval", metric, settings)
        if gain.low <= 0.0:
            notes.append(
                f"{take.label} is not certainly better than the base without an adapter: {gain.value:+.4f} "
                f"{display_name(metric)} ({gain.low:+.4f} to {gain.high:+.4f})."
            )
    return notes


def _seed_values(candidate: Candidate) -> list[float]:
    return [result.numbers["metric"]["value"] for result in candidate.results if result.numbers["metric"]]
