"""Read the rows and the scores of the evaluation from three artifacts that must belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation import reference_text, scoring
from qlora_retrain.evaluation.scoring import Row, RowScore
from qlora_retrain.lm import conversations


@dataclass(frozen=True, slots=True)
class EvaluationInputs:
    """The data and the result of the evaluation.

    Attributes:
        settings: The settings of the rules.
        labels: The closed set of answers, or None.
        rows: By suite: `eval` and `golden`.
        passages: The passages of the suite `reference`.
        max_tokens: The largest number of tokens of a passage that are scored at once.
        scores: By contestant: its scores in the evaluation.
    """

    settings: EvaluateConfig
    labels: list[str] | None
    rows: dict[str, list[Row]]
    passages: list[reference_text.Passage]
    max_tokens: int
    scores: dict[str, list[RowScore]]

    @classmethod
    def from_folders(cls, dataset: Path, evaluation: Path, reference_data: Path | None) -> EvaluationInputs:
        """Read the three artifacts.

        Raises:
            IntegrityError: If the evaluation was made on other rows or passages than those given.
        """
        data = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
        document = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        inputs = cls(
            settings=EvaluateConfig.model_validate(document["settings"]),
            labels=data["labels"],
            rows={suite: scoring.read_rows(dataset / f"{suite}.jsonl", suite) for suite in ("eval", "golden")},
            passages=reference_text.read_passages(reference_data) if reference_data else [],
            max_tokens=data["max_length_tokens"],
            scores=scoring.read_scores(evaluation / "scores.jsonl"),
        )

        # Scores are compared row by row, so the same rows must be in the same order.
        for suite, rows in inputs.rows.items():
            if [row.id for row in rows] != [score.id for score in inputs.unmerged_scores(suite)]:
                raise IntegrityError(
                    "evaluation: its rows are not those of the data set; it was made from another data set"
                )

        # Forgetting is measured passage by passage, so the passages must be the evaluation's.
        passage_ids = [reference_text.passage_id(passage) for passage in inputs.passages]
        if passage_ids != [score.id for score in inputs.unmerged_scores("reference")]:
            raise IntegrityError(
                "evaluation: its passages are not those of reference_data; it was made from other passages"
            )

        # An evaluation of an older release does not state the prompts, and the data set does.
        prompts = {(suite, row.id): row.prompt_id for suite, rows in inputs.rows.items() for row in rows}
        prompts |= {("reference", reference_text.passage_id(p)): reference_text.prompt_id(p) for p in inputs.passages}
        scores = {
            name: [replace(s, prompt_id=prompts.get((s.suite, s.id), "")) for s in rows]
            for name, rows in inputs.scores.items()
        }
        return replace(inputs, scores=scores)

    def unmerged_scores(self, suite: str) -> list[RowScore]:
        """Return the unmerged model's scores on a suite; the evaluation calls it `challenger`."""
        return [score for score in self.scores["challenger"] if score.suite == suite]

    @property
    def answers(self) -> dict[str, str]:
        """Return the true answer of each row id."""
        return {row.id: conversations.answer_of(row.messages) for rows in self.rows.values() for row in rows}
