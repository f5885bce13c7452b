"""Generate the contestants' own answers, and compare them with the right ones.

A completion is compared with the right answer as the chat template writes it, because the model has learnt to write
that: a template may put an empty reasoning block before an answer, or marks around a call. What both share around the
content is left out, and so is reasoning, which no metric compares.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import row_tokens
from qlora_retrain.evaluation.metrics import completion_metrics
from qlora_retrain.evaluation.metrics.call_metrics import RenderedCalls
from qlora_retrain.evaluation.rows import UNPARSABLE, Row, RowScore
from qlora_retrain.lm import conversations, generation
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.content_spans import reasoning_tags
from qlora_retrain.lm.generation import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# More than the longest mark that opens a reasoning block has.
_PROMPT_END_TOKENS = 16


def generate(
    settings: EvaluateConfig, model: PreTrainedModel, tokenizer: ChatTokenizer, rows: Sequence[Row]
) -> dict[str, Completion]:
    """Return the model's greedy answer to each row, by the row's id."""
    prompts = [row_tokens.split(tokenizer, row)[0] for row in rows]
    answers = generation.generate_answers(model, tokenizer, prompts, settings.max_new_tokens, settings.batch_tokens)
    return {row.id: answer for row, answer in zip(rows, answers, strict=True)}


@dataclass(frozen=True, slots=True)
class RightAnswer:
    """A row's right answer as the chat template writes it.

    Attributes:
        rendered: The answer as a model that has learnt it generates it.
        before: What the template writes before the content.
        after: What it writes between the content and the answer's end.
        opened_tag: The mark of a reasoning block that the prompt has opened; None where it has opened none.
        has_calls: Whether the answer calls tools.
        spoken_text: What the answer says beside the calls.
    """

    rendered: Completion
    before: str
    after: str
    opened_tag: str | None
    has_calls: bool
    spoken_text: str

    @classmethod
    def from_row(cls, tokenizer: ChatTokenizer, row: Row) -> RightAnswer:
        """Render the row's answer.

        Raises:
            IntegrityError: If the template refuses the row.
        """
        prompt_ids, answer_ids = row_tokens.split(tokenizer, row)
        rendered = Completion.from_ids(answer_ids, tokenizer)
        turn = conversations.answer_turn(row.messages) or {}
        has_calls = bool(turn.get("tool_calls"))

        content = str(turn.get("content") or "").strip()
        before, has_content, after = rendered.text.rpartition(content) if content else ("", "", "")
        if not has_content or has_calls:
            before = after = ""
        prompt_end = tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:]).rstrip()
        opened_tag = next((o for o, _ in reasoning_tags(prompt_end) if prompt_end.endswith(o)), None)
        return cls(rendered, before.strip(), after.strip(), opened_tag, has_calls, content)

    def content_of(self, completion: Completion, tokenizer: ChatTokenizer) -> str:
        """Return what a completion answers: without reasoning, and without what the template writes around it."""
        if self.before and completion.text.startswith(self.before):
            text = completion.text.removeprefix(self.before).strip()
        else:
            text = _after_reasoning(completion, tokenizer, self.opened_tag).text
        return text.removesuffix(self.after).strip() if self.after else text

    def metrics(self, names: Sequence[str], completion: Completion, tokenizer: ChatTokenizer) -> dict[str, float]:
        """Compute the metrics of a completion by name; metrics that are not defined for the row are left out."""
        answer, text = (self.content_of(item, tokenizer) for item in (self.rendered, completion))
        calls = None
        if self.has_calls:
            ours, theirs = (_after_reasoning(c, tokenizer, self.opened_tag) for c in (self.rendered, completion))
            calls = RenderedCalls(ours.marked_text, theirs.marked_text, self.spoken_text)
        return completion_metrics.compute(names, answer, text, calls)


def with_metrics(
    settings: EvaluateConfig,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    scores: Sequence[RowScore],
    labels: Sequence[str] | None,
    generated: Mapping[str, Completion],
) -> list[RowScore]:
    """Return the scores with the metrics of the completions.

    Args:
        settings: The selection of metrics.
        tokenizer: The model's.
        rows: The rows.
        scores: One for each row.
        labels: The closed set of answers, where the completion decides which one the model chose; else None.
        generated: What the model generated, by row id.
    """
    names = completion_metrics.selected_completion_metrics(settings)
    labels_by_text = {label.strip(): label for label in labels or ()}
    result = []
    for row, score in zip(rows, scores, strict=True):
        right, completion = RightAnswer.from_row(tokenizer, row), generated[row.id]
        score_with_values = replace(score, values=right.metrics(names, completion, tokenizer))
        if labels is not None:
            # Text that is no label is counted as wrong, and not stored.
            label = labels_by_text.get(right.content_of(completion, tokenizer), UNPARSABLE)
            is_correct = label == conversations.answer_of(row.messages)
            score_with_values = replace(score_with_values, predicted=label, correct=is_correct)
        result.append(score_with_values)
    return result


def _after_reasoning(completion: Completion, tokenizer: ChatTokenizer, opened_tag: str | None) -> Completion:
    """Return what follows a reasoning block at the start; nothing where the block never ends."""
    for opening, closing in reasoning_tags((opened_tag or "") + completion.marked_text):
        if opened_tag != opening and not completion.marked_text.startswith(opening):
            continue
        # In tokens, because a mark may be a special token, which the text has not.
        ids = completion.ids
        length = bisect.bisect_left(range(len(ids)), True, key=lambda i: closing in tokenizer.decode(ids[: i + 1]))
        return Completion.from_ids(ids[length + 1 :], tokenizer)
    return completion
