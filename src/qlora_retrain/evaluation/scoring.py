"""Score the rows of a data set with a model: one loss per row, and the model's choice for a closed set of labels.

Reads a loaded model and its tokenizer, and chats or plain text. Makes one `RowScore` per row. Labels are ranked by the
likelihood of the whole answer with its end token (`label_ranking`). Logits are computed only where a token is scored.
Refuses (13) rows and scores that are damaged. Command: none; `evaluate` and `merge_adapter` call it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.evaluation import answer_endings, completions, label_scores, reference_text, row_tokens, slices
from qlora_retrain.evaluation.metrics import completion_metrics
from qlora_retrain.evaluation.reference_text import Passage
from qlora_retrain.evaluation.rows import UNPARSABLE as UNPARSABLE
from qlora_retrain.evaluation.rows import Row as Row
from qlora_retrain.evaluation.rows import RowScore as RowScore
from qlora_retrain.evaluation.rows import read_rows as read_rows
from qlora_retrain.evaluation.rows import read_scores as read_scores
from qlora_retrain.evaluation.rows import write_scores as write_scores
from qlora_retrain.lm import bounded, forward
from qlora_retrain.lm.chat import ChatTokenizer, RowRefused
from qlora_retrain.lm.forward import TargetSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# At most one line of the log per second, however fast the batches are.
_SECONDS_BETWEEN_UPDATES = 1.0


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """What is measured beside the scores of the rows.

    Attributes:
        generate_golden: Generate answers to the golden rows even where no metric needs them.
        measure_endings: Measure whether answers end by themselves even where no metric has them generated.
        skip_refused: Leave out rows that the model's chat template refuses; their scores have no tokens.
    """

    generate_golden: bool = False
    measure_endings: bool = False
    skip_refused: bool = False


def attn_implementation(device: str) -> str:
    """Return the attention to score with; it must accept a trie's mask, which flash attention does not."""
    return "sdpa" if device == "cuda" else "eager"


def score_and_generate(
    settings: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    options: ScoringOptions = ScoringOptions(),
    *,
    description: str,
    done: int = 0,
    total: int | None = None,
) -> tuple[list[RowScore], dict[str, str]]:
    """Score every row as the line's settings ask, and generate completions where a metric needs them.

    Arguments that `score_rows` also has mean the same there.

    Args:
        settings: The selection of metrics, and how labels are scored.
        model: The model.
        tokenizer: The model's own.
        rows: Chats whose last turn is the answer.
        labels: The closed set of answers, or None.
        options: What is measured beside the scores.
        description: The name of the work in the progress line.
        done: The rows finished before these.
        total: The rows in all; None: just these.

    Returns:
        The scores, and the texts of completions by row id: of all rows where a metric needs them; else of the golden
        rows where `generate_golden` is set; else none.
    """
    refusals = row_tokens.refusals(tokenizer, rows) if options.skip_refused else [None] * len(rows)
    all_rows, rows = rows, [row for row, refusal in zip(rows, refusals, strict=True) if refusal is None]
    if first := next(filter(None, refusals), None):
        progress.say(
            f"{len(all_rows) - len(rows)} of {len(all_rows)} rows are left out, the first since {first.detail}"
        )
    needs_completions = completion_metrics.needs_completions(settings)
    to_generate = [row for row in rows if needs_completions or (options.generate_golden and row.suite == "golden")]
    generated = completions.generate(settings, model, tokenizer, to_generate)

    # A generated label replaces the ranking, but the loss of the right answer is measured in both cases.
    is_label_generated = labels is not None and settings.label_scoring == "generation"
    scores = score_rows(
        model,
        tokenizer,
        rows,
        labels=None if is_label_generated else labels,
        batch_tokens=settings.batch_tokens,
        description=description,
        done=done,
        total=total,
        last_answer_only=is_label_generated,
    )
    if needs_completions:
        scores = completions.with_metrics(
            settings, tokenizer, rows, scores, labels if is_label_generated else None, generated
        )
    if settings.stop_rows and (needs_completions or options.measure_endings):
        answers = answer_endings.measure(settings, model, tokenizer, rows, labels, generated)
        scores = answer_endings.with_endings(scores, answers)

    texts = {row_id: completion.text for row_id, completion in generated.items()}
    return with_places(scores, all_rows), texts


def with_places(scores: Sequence[RowScore], rows: Sequence[Row]) -> list[RowScore]:
    """Return a score for each row, in the order of `rows`: one without tokens holds the place of a row without one."""
    by_row = {(score.suite, score.id): score for score in scores}
    return [
        by_row.get((row.suite, row.id), RowScore(row.id, row.suite, 0.0, 0, prompt_id=row.prompt_id)) for row in rows
    ]


def score_rows(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    *,
    labels: Sequence[str] | None,
    batch_tokens: int,
    description: str,
    done: int = 0,
    total: int | None = None,
    last_answer_only: bool = False,
) -> list[RowScore]:
    """Score every row, in the order of `rows`.

    Args:
        model: A model in evaluation mode: plain, 4-bit or with an adapter; eager or sdpa attention.
        tokenizer: The model's own.
        rows: Chats whose last turn is the answer.
        labels: The closed set of answers, ranked by the likelihood of the whole answer with its end token. None:
            score the tokens of every assistant turn and choose nothing.
        batch_tokens: The tokens of a forward pass, padding included; a longer row forms a batch of its own.
        description: The name of the work in the progress line.
        done: The rows finished before these, for the progress line.
        total: The rows in all, for the progress line; None: just these.
        last_answer_only: Without labels: score only the last assistant turn.
    """
    on_progress = _ProgressReporter(description, done, done + len(rows) if total is None else total)
    if labels is not None:
        return label_scores.rank_labels(model, tokenizer, rows, labels, batch_tokens, on_progress)

    # The answer of a label task is the last turn; in a text task every assistant turn is one.
    if last_answer_only:
        items = [[row_tokens.answer_sequence(*row_tokens.split(tokenizer, row))] for row in rows]
    else:
        items = [
            [TargetSequence.from_mask(example.input_ids, example.supervised) for example in examples]
            for examples in row_tokens.examples(tokenizer, rows)
        ]
    sums = _score_groups(model, items, batch_tokens, on_progress)
    return [
        RowScore(
            row.id,
            row.suite,
            group.loss_nats,
            group.tokens,
            slices=slices.slice_names(row.messages, row.language, has_labels=last_answer_only),
            prompt_id=row.prompt_id,
        )
        for row, group in zip(rows, sums, strict=True)
    ]


def score_passages(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    passages: Sequence[Passage],
    *,
    batch_tokens: int,
    description: str,
    max_tokens: int = 1024,
    done: int = 0,
    total: int | None = None,
    skip_refused: bool = False,
) -> list[RowScore]:
    """Score general passages: their loss, and the number of tokens that are the model's own first choice.

    A text is cut into pieces of at most `max_tokens`, and every token of a piece but the first is scored. In a chat
    the assistant's tokens are scored. With `skip_refused`, a chat that the model's template refuses has no tokens.
    """
    items = [_split_passage(tokenizer, passage, max_tokens, skip_refused=skip_refused) for passage in passages]
    on_progress = _ProgressReporter(description, done, done + len(passages) if total is None else total)
    sums = _score_groups(model, items, batch_tokens, on_progress)
    return [
        RowScore(
            reference_text.passage_id(passage),
            "reference",
            group.loss_nats,
            group.tokens,
            hits=group.hits,
            prompt_id=reference_text.prompt_id(passage),
        )
        for passage, group in zip(passages, sums, strict=True)
    ]


@dataclass(slots=True)
class _GroupScore:
    """The sums over the sequences of one row or passage."""

    loss_nats: float = 0.0
    tokens: int = 0
    hits: int = 0


def _score_groups(
    model: PreTrainedModel,
    groups: Sequence[Sequence[TargetSequence]],
    batch_tokens: int,
    on_progress: _ProgressReporter,
) -> list[_GroupScore]:
    """Score the sequences of all groups, which share batches, and sum them by group."""
    items = [item for group in groups for item in group]
    owners = [i for i, group in enumerate(groups) for _ in group]
    sums = [_GroupScore() for _ in groups]
    # Progress counts groups, and a batch does not say which of them it finished.
    is_one_each = len(items) == len(groups)
    item_scores = forward.score_sequences(model, items, batch_tokens, on_progress if is_one_each else None)
    for owner, item, item_score in zip(owners, items, item_scores, strict=True):
        sums[owner].loss_nats += item_score.loss_nats
        sums[owner].tokens += len(item.target_ids)
        sums[owner].hits += item_score.hits
    if not is_one_each:
        on_progress(len(groups))
    return sums


def _split_passage(
    tokenizer: ChatTokenizer, passage: Passage, max_tokens: int, *, skip_refused: bool
) -> list[TargetSequence]:
    """Return the sequences of a passage; none where the template refuses a chat, and that is allowed.

    Raises:
        UsageError: If the template refuses a chat.
    """
    if not isinstance(passage, str):
        try:
            examples = tokenizer.encode(passage)
        except RowRefused as refusal:
            if skip_refused:
                return []
            raise UsageError(
                f"reference_data: the passage {reference_text.passage_id(passage)}: {refusal.detail}; leave it out"
            ) from refusal
        return [TargetSequence.from_mask(example.input_ids, example.supervised) for example in examples]
    (ids,) = bounded.tokenize(tokenizer.tokenizer, [passage], add_special_tokens=True)
    pieces = [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]
    # The first token of a piece has no context, so a piece of one token has nothing to score.
    return [TargetSequence.from_mask(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]


class _ProgressReporter:
    """Report progress at most once a second, and at the end."""

    def __init__(self, description: str, done: int, total: int) -> None:
        self.description, self.done, self.total = description, done, total
        self.last_update = time.monotonic()

    def __call__(self, num_rows: int) -> None:
        self.done += num_rows
        if self.done == self.total or time.monotonic() - self.last_update > _SECONDS_BETWEEN_UPDATES:
            self.last_update = time.monotonic()
            progress.update(self.description, self.done, self.total)
