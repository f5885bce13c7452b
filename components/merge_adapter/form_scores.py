"""Score a form of the merged model: on the evaluation rows, on reference text, and against the unmerged model.

A form is a version of the model: a candidate, or an export of the selected one. Every form is compared with the
unmerged model, the 4-bit base with the adapter over it; `certificate.json` and the manifest call that one `live`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.merge_adapter.agreement import Agreement, UnmergedLogits
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.evaluation import answer_endings, scoring
from qlora_retrain.evaluation.reference_text import Passage
from qlora_retrain.evaluation.scoring import Row, RowScore, ScoringOptions
from qlora_retrain.lm import chat
from qlora_retrain.lm.generation import Completion
from qlora_retrain.lm.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class FormScores:
    """The scores of one form of the merged model, and its agreement with the unmerged model.

    Attributes:
        scores: The scores of evaluation rows.
        agreement: What it has in common with the unmerged model, by row.
        passages: The scores of the passages that choose a strength; empty where none is chosen.
    """

    scores: list[RowScore]
    agreement: list[Agreement]
    passages: tuple[RowScore, ...] = ()

    def subset(self, ids: frozenset[str]) -> FormScores:
        """Return the scores of the rows with these ids."""
        rows, agreement = [s for s in self.scores if s.id in ids], [a for a in self.agreement if a.id in ids]
        return replace(self, scores=rows, agreement=agreement)

    def with_endings(self, answers: Mapping[str, Completion]) -> FormScores:
        """Return the scores with what the answers, by row id, show: whether they ended by themselves."""
        return replace(self, scores=answer_endings.with_endings(self.scores, answers))

    @property
    def loss(self) -> float:
        """Return the loss in nats per token; infinite where the loss of a row is not finite."""
        return mean_loss(self.scores)


def mean_loss(scores: Sequence[RowScore]) -> float:
    """Return the loss in nats per token; infinite where there is no token, or a loss is not finite."""
    # Infinite, so that a form with a broken row is never selected.
    total, tokens = sum(s.loss_nats for s in scores), sum(s.tokens for s in scores)
    return total / tokens if tokens and math.isfinite(total) else math.inf


@dataclass(frozen=True, slots=True)
class FormScorer:
    """Scores every form of the merged model in the same way.

    Attributes:
        unmerged_logits: With which a form is compared; they are of the rows that certify.
        rows: The evaluation rows; all are scored.
        labels: The closed set of answers, or None.
        load_options: The options with which models are loaded: device, attention implementation, dtype.
        settings: The evaluation's settings: the metrics, and the tokens of a forward pass.
        passages: The passages that choose a strength.
        max_tokens: The largest number of tokens of a passage that are scored at once.
    """

    unmerged_logits: UnmergedLogits
    rows: Sequence[Row]
    labels: Sequence[str] | None
    load_options: LoadOptions
    settings: EvaluateConfig
    passages: Sequence[Passage] = ()
    max_tokens: int = 1024

    def score(
        self, name: str, model: Any, folder: Path, rows: Sequence[Row] | None = None, *, measure_endings: bool = False
    ) -> FormScores:
        """Score a loaded form, and compare it with the unmerged model.

        Args:
            name: The form's name in the progress line.
            model: The loaded form.
            folder: A model folder with the form's tokenizer.
            rows: The rows to score; all evaluation rows where None.
            measure_endings: Measure whether its answers end by themselves, which takes longer.
        """
        tokenizer, rows = chat.load_tokenizer(folder), self.rows if rows is None else rows
        options = ScoringOptions(measure_endings=measure_endings)
        scores, _ = scoring.score_and_generate(
            self.settings, model, tokenizer, rows, self.labels, options, description=f"scoring {name}"
        )

        description = f"comparing {name} with the unmerged model"
        return FormScores(scores, self.unmerged_logits.compare(model, description))

    def score_candidate(self, name: str, model: Any, folder: Path) -> FormScores:
        """Score a loaded form as `score` does, and on the passages that choose a strength."""
        scores = self.score(name, model, folder)
        if not self.passages:
            return scores
        passages = scoring.score_passages(
            model,
            chat.load_tokenizer(folder),
            self.passages,
            batch_tokens=self.settings.batch_tokens,
            description=f"scoring {name} on reference text",
            max_tokens=self.max_tokens,
        )
        return replace(scores, passages=tuple(passages))
