"""Choose the form that ships: first the base, then whether adapters are averaged, then the rank, then the strength.

The rows of one half choose base, average and rank by the loss. The passages of one half say which strengths stay
within the limits on forgetting; the strongest of these ships, or the form with reduced intruder dimensions where that
costs less. The other halves certify the choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from components.merge_adapter import adapter_forms, soup
from components.merge_adapter.candidates import BASES, MAX_FORMS, Candidate, Workshop
from components.merge_adapter.evaluation_inputs import EvaluationInputs
from components.merge_adapter.form_scores import FormScorer, FormScores, mean_loss
from components.merge_adapter.halves import Parts
from components.merge_adapter.trials import Choice, Trial, describe_curve, describe_strength, preference
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation.rows import count_prompts
from qlora_retrain.evaluation.rules import forgetting_rule
from qlora_retrain.evaluation.rules.rule_result import RuleResult
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.lm import adapter_start, loading
from qlora_retrain.lm.adapter_kind import adapter_kind, has_matrices, has_whole_modules

STRENGTHS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(slots=True)
class Chooser:
    """Goes through the stages; each begins with the winner of the one before.

    Attributes:
        config: The settings, without `base: auto`.
        base_reason: Why the base was taken unmeasured; empty where both are measured.
        workshop: Builds the candidates.
        scorer: Scores them.
        inputs: The scores of the evaluation.
        parts: What chooses and what certifies.
        trials: What was measured so far.
        reasons: Why the stages chose what they did.
        rules: What the stages found to fail.
    """

    config: MergeConfig
    base_reason: str
    workshop: Workshop
    scorer: FormScorer
    inputs: EvaluationInputs
    parts: Parts
    trials: list[Trial] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    rules: list[RuleResult] = field(default_factory=list)

    def choose(self, bases: Sequence[Candidate]) -> Choice:
        """Choose among the candidates that were built, and those that are made of the best of them."""
        winner, full_rank = self._choose_base(bases), None
        if has_matrices(self.workshop.adapter):
            full_rank = adapter_forms.rank_of(self.workshop.adapter)
            winner = self._choose_soup(winner)
            winner = self._choose_rank(winner, full_rank)
            winner = self._choose_strength(winner)
        choice = Choice(tuple(self.trials), winner, full_rank, tuple(self.reasons), tuple(self.rules))
        progress.say(choice.sentence)
        return choice

    def _choose_base(self, bases: Sequence[Candidate]) -> Trial:
        """Keep the base with the lowest loss, the first among equals.

        The loss decides for label tasks too. Two forms of one model differ in the answers to at most one or two rows
        of a hundred, but in the loss of every row.
        """
        trials = [self._measure(candidate) for candidate in bases]
        winner = min(trials, key=lambda trial: trial.loss)
        for trial in trials:
            if trial is not winner:
                self.workshop.drop(trial.candidate)
        losses = ", ".join(f"{trial.candidate.name} {trial.loss:.4f}" for trial in trials)
        self.reasons.append(
            self.base_reason
            or f"{winner.candidate.base}: its loss in nats per token on the {len(self.parts.rows.selection)} rows that "
            f"select is the lower one: {losses}"
        )
        return winner

    def _choose_soup(self, whole: Trial) -> Trial:
        """Average the adapter with those of earlier versions, where that is better on the rows that select."""
        if self.config.soup is None:
            return whole
        if reason := soup.obstacle(self.workshop.earlier, self.parts):
            self.reasons.append(f"no average of adapters (merge.soup), since {reason}")
            return whole
        trial = self._try(replace(whole.candidate, num_adapters=len(self.workshop.earlier) + 1))
        is_better = soup.standing(trial) < soup.standing(whole)
        self.reasons.append(soup.describe(self.config, self.workshop.earlier, trial, whole, is_better=is_better))
        return self._replace(whole, trial) if is_better else self._replace(trial, whole)

    def _choose_rank(self, whole: Trial, full_rank: int) -> Trial:
        """Cut to the rank that is set, or to the smallest one that costs little."""
        setting = self.config.rank
        if setting in ("full", full_rank):
            self.reasons.append(f"rank {full_rank}, as it was trained")
            return whole
        if isinstance(setting, int):
            self.reasons.append(f"rank {setting} of {full_rank}, as merge.rank sets it")
            return self._replace(whole, self._try(replace(whole.candidate, rank=setting)))

        winner, limit = whole, whole.loss + self.config.max_rank_loss_nats
        ranks = list(_halvings(full_rank))[: self._forms_for_ranks()]
        for rank in ranks:
            trial = self._try(replace(whole.candidate, rank=rank))
            winner = self._replace(winner, trial) if trial.loss <= limit else self._replace(trial, winner)
        rank = winner.candidate.rank or full_rank
        self.reasons.append(
            f"rank {rank} of {full_rank}, the smallest whose loss on the rows that select is at most "
            f"{self.config.max_rank_loss_nats:g} nats above the whole rank's ({winner.loss:.4f} and {whole.loss:.4f})"
        )
        return winner

    def _choose_strength(self, whole: Trial) -> Trial:
        """Weaken the adapter as it is set, or where it forgets more than the limits allow."""
        setting = self.config.strength
        if isinstance(setting, float) and setting != 1:
            self.reasons.append(f"strength {setting:g}, as merge.strength sets it")
            return self._replace(whole, self._try(replace(whole.candidate, strength=setting)))
        if not self.parts.passages.selection:
            reason = self.parts.strength_reason
            self.reasons.append("full strength" + (f", since {reason}" if reason else ""))
            return whole
        where = f"on the {len(self.parts.passages.selection)} passages that choose"
        if whole.is_within_limits:
            self.reasons.append(f"full strength, which stays within the limits on forgetting {where}")
            return whole
        return self._weaken_measured(whole, where)

    def _weaken_measured(self, whole: Trial, where: str) -> Trial:
        """Try weaker forms until one stays within the limits, and keep the best of them."""
        trials, winner = [whole], whole
        for candidate in self._weaker(whole.candidate):
            # A strength below one that stays within the limits would only cost more of the task.
            if winner.is_within_limits and not candidate.has_reduced_intruders:
                continue
            trial = self._try(candidate)
            trials.append(trial)
            is_better = preference(trial) < preference(winner)
            winner = self._replace(winner, trial) if is_better else self._replace(trial, winner)

        strength, curve = describe_strength(winner.candidate), describe_curve(trials)
        if winner.is_within_limits:
            reason = f"of the forms that stay within the limits on forgetting {where} it has the least loss ({curve})"
            self.reasons.append(f"{strength}: {reason}")
            return winner
        self.reasons.append(f"{strength}, which comes nearest to the limits on forgetting")
        text = (
            f"no strength stays within the limits on forgetting {where}: {curve}; train for fewer steps, with a lower "
            "learning_rate or rank, or with general chats among the rows, or raise the limit"
        )
        self.rules.append(RuleResult("strength", text, passed=False))
        return winner

    def _weaker(self, whole: Candidate) -> Iterator[Candidate]:
        for strength in STRENGTHS:
            yield replace(whole, strength=strength)
        reduced = replace(whole, has_reduced_intruders=True)
        # DoRA scales the rows after B A is added, so no B A takes a direction out of them.
        if self.inputs.settings.intruder_top_k and not adapter_forms.has_magnitudes(self.workshop.adapter):
            self.workshop.adapter_of(reduced)
            if self.workshop.num_intruders:
                yield reduced

    def _forms_for_ranks(self) -> int:
        """Return how many ranks may be tried, so that enough forms are left for the strengths."""
        strengths = len(STRENGTHS) + 1 if self.parts.passages.selection else 0
        averages = 1 if self.workshop.earlier else 0
        return MAX_FORMS - len(BASES) - averages - strengths

    def _try(self, candidate: Candidate) -> Trial:
        self.workshop.build(candidate)
        return self._measure(candidate)

    def _replace(self, loser: Trial, winner: Trial) -> Trial:
        self.workshop.drop(loser.candidate)
        return winner

    def _measure(self, candidate: Candidate) -> Trial:
        """Score a candidate that was built."""
        scores = self.workshop.score(candidate, self.scorer)
        ids = self.parts.rows.selection or self.parts.rows.certification
        loss = scores.subset(ids).loss
        unmerged = mean_loss([s for s in self.inputs.unmerged_scores("eval") if s.id in ids])
        trial = Trial(candidate, scores, loss, loss - unmerged, tuple(self._forgetting(scores)))
        self.trials.append(trial)
        return trial

    def _forgetting(self, scores: FormScores) -> Iterator[RuleResult]:
        """Apply the limits on forgetting to the passages that choose."""
        if not scores.passages:
            return
        ids = self.parts.passages.selection
        base = [s for s in self.inputs.scores["base"] if s.suite == "reference" and s.id in ids]
        contestants = {"base": base, "challenger": scores.passages}
        if not all(math.isfinite(score.loss_nats) for score in scores.passages):
            yield RuleResult("forgetting", "its loss on reference text is not finite", passed=False)
            return
        for metric, limit in forgetting_rule.limits(contestants, self.inputs.settings).items():
            yield forgetting_rule.forgetting(contestants, self.inputs.settings, metric, limit)


def resolve_base(
    config: MergeConfig, rows: Sequence[Row], *, is_packed: bool = True, is_adapter: bool = True
) -> tuple[MergeConfig, str]:
    """Return the settings without `base: auto`, and why one base was taken unmeasured; empty where both are measured.

    Args:
        config: The line's settings.
        rows: The evaluation rows.
        is_packed: Whether the adapter was trained over other values than the original ones.
        is_adapter: Whether there is an adapter to merge, and not all weights trained.
    """
    if not is_adapter:
        reason = "original: all weights trained (train.method: full), so they ship as they are, and nothing was merged"
        return config.model_copy(update={"base": "original"}), reason
    if not is_packed:
        reason = (
            "original: the adapter was trained over its 16-bit weights (quantize.format: none), so there is no other"
        )
        return config.model_copy(update={"base": "original"}), reason
    if config.base != "auto":
        reason = f"{config.base}, as merge.base sets it; no measurement selected it"
        return config, "" if config.base == "measured" else reason

    # With fewer prompts than one half needs, nothing can be certified, and `measured` refuses for that.
    prompts = count_prompts(rows)
    base = "dequantized" if prompts // 2 < config.min_prompts <= prompts else "measured"
    reason = (
        f"{base}, which computes what was evaluated: evaluation rows of {prompts} different prompts are too few to "
        f"select on one half and certify on the other, of at least {config.min_prompts} prompts each "
        "(merge.min_prompts), so all of them certify it"
    )
    return config.model_copy(update={"base": base}), "" if base == "measured" else reason


def whole_adapter_where_needed(config: MergeConfig, base_nf4: Path, adapter: Path) -> MergeConfig:
    """Return the settings with rank and strength `full` where the training has no smaller or weaker form.

    A part of the adapter of LoftQ and of LQ-LoRA corrects the packed base, and a weaker one would correct it less.
    Other adapters than LoRA have no rank.
    """
    if loading.has_all_weights(adapter):
        reason = "all weights trained, and there is no adapter"
    elif not has_matrices(adapter):
        reason = f"an adapter of the kind {adapter_kind(adapter)} has no matrices that could be cut or weakened"
    elif has_whole_modules(adapter):
        reason = "modules of train.modules_to_save learnt whole beside the adapter"
    elif adapter_start.corrects_base(base_nf4):
        reason = "the adapter also corrects the packed base, from which it started"
    else:
        return config
    if (config.rank, config.strength) != ("full", "full"):
        progress.say(f"merge.rank and merge.strength: full, since {reason}")
    return config.model_copy(update={"rank": "full", "strength": "full"})


def _halvings(rank: int) -> Iterator[int]:
    """Yield a half, a quarter, an eighth, ... of a rank, rounded down, until 1."""
    while rank > 1:
        rank //= 2
        yield rank
