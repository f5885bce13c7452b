"""Measure how many greedy answers end by themselves, before the limit of new tokens.

A model that learnt no end is right at every token and still useless: asked, it repeats itself until the limit. No
likelihood shows that, and least of all that of a label. So answers are generated, to a sample of the evaluation rows.
An answer that ends at once with nothing is counted too: it is useless in another way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import row_tokens
from qlora_retrain.evaluation.label_scores import longest_label
from qlora_retrain.evaluation.rows import Row, RowScore
from qlora_retrain.lm import conversations, generation
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.generation import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METRIC = "answers_ended"  # of a row: 1 where its answer ended by itself
EMPTY = "answers_empty"  # of a row: 1 where its answer says and calls nothing
# A label that has not ended so many tokens after the longest label could have ended is no label any more.
_TOKENS_BEYOND_LABELS = 16


@dataclass(frozen=True, slots=True)
class _Sample:
    """The rows whose answers are generated, their prompts, and the limit of new tokens."""

    rows: list[Row]
    prompts: list[list[int]]
    max_new_tokens: int


def measure(
    settings: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    completions: Mapping[str, Completion],
) -> dict[str, Completion]:
    """Return the model's greedy answers by row id, for a sample of the evaluation rows.

    The sample has at most `stop_rows` rows whose right answer fits the limit, chosen by the hash of their id.

    Args:
        settings: The limits.
        model: In evaluation mode.
        tokenizer: The model's own.
        rows: Rows of any suite.
        labels: The closed set of answers, or None.
        completions: What the model generated already, by row id; the other answers are generated here.
    """
    sample = _sample(settings, tokenizer, rows, labels)
    missing = [i for i, row in enumerate(sample.rows) if row.id not in completions]
    answers = generation.generate_answers(
        model,
        tokenizer,
        [sample.prompts[i] for i in missing],
        sample.max_new_tokens,
        settings.batch_tokens,
        description="generating answers to see whether they end",
    )
    generated = {sample.rows[i].id: answer for i, answer in zip(missing, answers, strict=True)}
    return {row.id: completions.get(row.id) or generated[row.id] for row in sample.rows}


def with_endings(scores: Sequence[RowScore], answers: Mapping[str, Completion]) -> list[RowScore]:
    """Return the scores with the metrics of the rows that were measured; golden rows may have the same id."""
    return [
        replace(s, values={**s.values, **_metrics(answers[s.id])}) if s.suite == "eval" and s.id in answers else s
        for s in scores
    ]


def _metrics(answer: Completion) -> dict[str, float]:
    # With the marks of calls, since an answer may call a tool and say nothing.
    return {METRIC: float(answer.ended), EMPTY: float(not answer.marked_text)}


def _sample(
    settings: EvaluateConfig, tokenizer: ChatTokenizer, rows: Sequence[Row], labels: Sequence[str] | None
) -> _Sample:
    sample = _Sample([], [], settings.max_new_tokens)
    # A row that asks nothing, a text alone, has no answer whose length anybody knows.
    candidates = [row for row in rows if row.suite == "eval" and conversations.prompt_of(row.messages)]
    for row in sorted(candidates, key=lambda row: hashlib.sha256(f"stop:{row.id}".encode()).digest()):
        if len(sample.rows) == settings.stop_rows:
            break
        prompt, answer = row_tokens.split(tokenizer, row)
        if len(answer) <= settings.max_new_tokens:
            sample.rows.append(row)
            sample.prompts.append(prompt)

    # Labels are short, and a model that repeats them would generate to the limit in every row.
    if labels and sample.rows:
        longest = longest_label(tokenizer, sample.rows[0], labels) + _TOKENS_BEYOND_LABELS
        return replace(sample, max_new_tokens=min(longest, settings.max_new_tokens))
    return sample
