"""Hold what was measured of each candidate, say which one is better, and describe it in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from components.merge_adapter.adapter_forms import INTRUDER_STRENGTH
from components.merge_adapter.candidates import Candidate
from components.merge_adapter.form_scores import FormScores
from qlora_retrain.evaluation.rules.rule_result import RuleResult


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate with what was measured of it.

    Attributes:
        candidate: The candidate.
        scores: Its scores.
        loss: Its loss on the rows that select; on all rows where none select.
        cost: How much more that is than the unmerged model's, in nats per token.
        forgetting: The limits on forgetting, applied to it on the passages that choose; empty where none choose.
    """

    candidate: Candidate
    scores: FormScores
    loss: float
    cost: float
    forgetting: tuple[RuleResult, ...]

    @property
    def is_within_limits(self) -> bool:
        """Whether it forgets no more than the limits allow."""
        return all(rule.passed for rule in self.forgetting)

    @property
    def excess(self) -> float:
        """By how much what it forgets may exceed a limit, as a multiple of the limit."""
        return max((rule.high / rule.limit for rule in self.forgetting if rule.high and rule.limit), default=math.inf)


@dataclass(frozen=True, slots=True)
class Choice:
    """What ships, and what else was tried.

    Attributes:
        trials: Every candidate that was scored, in the order of the stages; each name once.
        winner: The one that ships.
        full_rank: The rank of the adapter that was trained; None where all weights trained, without one.
        reasons: Why its base, its rank and its strength were chosen.
        rules: A rule that fails where no strength stays within the limits.
    """

    trials: tuple[Trial, ...]
    winner: Trial
    full_rank: int | None
    reasons: tuple[str, ...]
    rules: tuple[RuleResult, ...]

    @property
    def rank(self) -> int | None:
        """Return the rank of the adapter that ships, if any."""
        return self.winner.candidate.rank or self.full_rank

    @property
    def sentence(self) -> str:
        """Return the choice and its reasons in a sentence."""
        return "; ".join(self.reasons)


def preference(trial: Trial) -> tuple[bool, float]:
    """Return what is least for the trial that should ship: within the limits, then by loss; else by the excess."""
    return (False, trial.loss) if trial.is_within_limits else (True, trial.excess)


def describe_strength(candidate: Candidate) -> str:
    """Return a candidate's strength for a sentence."""
    if candidate.has_reduced_intruders:
        return f"intruder dimensions at {INTRUDER_STRENGTH:g} of their strength"
    return f"strength {candidate.strength:g}"


def describe_curve(trials: Sequence[Trial]) -> str:
    """Return what each strength cost and forgot, for a sentence."""
    return ", ".join(
        f"{describe_strength(trial.candidate)}: loss {trial.loss:.4f}, forgot "
        + " and ".join(_forgotten(rule) for rule in trial.forgetting)
        for trial in trials
    )


def _forgotten(rule: RuleResult) -> str:
    if rule.value is None:
        return "everything: its loss is not finite"
    return f"{rule.value:.4f} (at most {rule.high:.4f}, limit {rule.limit:g})"
