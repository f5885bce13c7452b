"""Score the rows of a data set with a model: one loss per row, and the model's choice for a closed set of labels.

Reads a loaded model and its tokenizer, and chats or plain text. Makes one `RowScore` per row. Labels are ranked by the
likelihood of the whole answer with its end token (`label_ranking`). Logits are computed only where a token is scored.
Refuses (13) rows and scores that are damaged. Command: none; `evaluate` and `merge_adapter` call it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import reference_text, slices
from qlora_retrain.evaluation.metrics import completion_metrics
from qlora_retrain.evaluation.reference_text import Passage
from qlora_retrain.evaluation.rows import UNPARSABLE as UNPARSABLE
from qlora_retrain.evaluation.rows import Row as Row
from qlora_retrain.evaluation.rows import RowScore as RowScore
from qlora_retrain.evaluation.rows import read_rows as read_rows
from qlora_retrain.evaluation.rows import read_scores as read_scores
from qlora_retrain.evaluation.rows import write_scores as write_scores
from qlora_retrain.lm import chat, forward, generation, label_ranking
from qlora_retrain.lm.forward import TargetSequence
from qlora_retrain.lm.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# At most one line of the log per second, however fast the batches are.
_SECONDS_BETWEEN_UPDATES = 1.0


def attn_implementation(device: str) -> str:
    """Return the attention to score with; it must accept a trie's mask, which flash attention does not."""
    return "sdpa" if device == "cuda" else "eager"


def score_and_generate(
    settings: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    generate_golden: bool = False,
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
        generate_golden: Generate completions for the golden rows even where no metric needs them.
        description: The name of the work in the progress line.
        done: The rows finished before these.
        total: The rows in all; None: just these.

    Returns:
        The scores, and the completions by row id: of all rows where a metric needs them; else of the golden rows
        where `generate_golden` is set; else none.
    """
    needs_completions = completion_metrics.needs_completions(settings)
    to_generate = [row for row in rows if needs_completions or (generate_golden and row.suite == "golden")]
    prompts = [chat.prompt_ids(tokenizer, chat.prompt_of(row.messages)) for row in to_generate]
    texts = generation.generate_answers(model, tokenizer, prompts, settings.max_new_tokens, settings.batch_tokens)
    completions = {row.id: text for row, text in zip(to_generate, texts, strict=True)}

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
    if labels is not None and is_label_generated:
        scores = [_with_generated_label(r, s, labels, completions) for r, s in zip(rows, scores, strict=True)]

    if needs_completions:
        selected = completion_metrics.selected_completion_metrics(settings)
        scores = [
            replace(s, values=completion_metrics.compute(selected, chat.answer_of(r.messages), completions[r.id]))
            for r, s in zip(rows, scores, strict=True)
        ]
    return scores, completions


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
        return _rank_labels(model, tokenizer, rows, labels, batch_tokens, on_progress)

    # The answer of a label task is the last turn; in a text task every assistant turn is one.
    if last_answer_only:
        items = [_answer_item(tokenizer, r, chat.prompt_ids(tokenizer, chat.prompt_of(r.messages))) for r in rows]
    else:
        encoded_rows = [chat.encode(tokenizer, row.messages) for row in rows]
        items = [TargetSequence.from_mask(encoded.input_ids, encoded.supervised) for encoded in encoded_rows]
    item_scores = forward.score_sequences(model, items, batch_tokens, on_progress)
    return [
        RowScore(
            row.id,
            row.suite,
            item_score.loss_nats,
            len(item.target_ids),
            slices=slices.slice_names(row.messages, row.language, has_labels=last_answer_only),
        )
        for row, item_score, item in zip(rows, item_scores, items, strict=True)
    ]


def score_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    *,
    batch_tokens: int,
    description: str,
    max_tokens: int = 1024,
    done: int = 0,
    total: int | None = None,
) -> list[RowScore]:
    """Score general passages: their loss, and the number of tokens that are the model's own first choice.

    A text is cut into pieces of at most `max_tokens`, and every token of a piece but the first is scored. In a chat
    the assistant's tokens are scored.
    """
    pieces: list[TargetSequence] = []
    owners: list[int] = []  # the index of the passage that a piece belongs to
    for i, passage in enumerate(passages):
        passage_pieces = list(_split_passage(tokenizer, passage, max_tokens))
        pieces += passage_pieces
        owners += [i] * len(passage_pieces)

    # The pieces of all passages share batches; a passage's score is the sum over its pieces.
    on_progress = _ProgressReporter(description, done, done + len(passages) if total is None else total)
    losses, tokens, hits = [0.0] * len(passages), [0] * len(passages), [0] * len(passages)
    piece_scores = forward.score_sequences(model, pieces, batch_tokens)
    for owner, piece, piece_score in zip(owners, pieces, piece_scores, strict=True):
        losses[owner] += piece_score.loss_nats
        tokens[owner] += len(piece.target_ids)
        hits[owner] += piece_score.hits
    on_progress(len(passages))

    return [
        RowScore(reference_text.passage_id(passage), "reference", loss, count, hits=hit_count)
        for passage, loss, count, hit_count in zip(passages, losses, tokens, hits, strict=True)
    ]


def _split_passage(tokenizer: PreTrainedTokenizerBase, passage: Passage, max_tokens: int) -> Iterator[TargetSequence]:
    if not isinstance(passage, str):
        encoded = chat.encode(tokenizer, passage)
        yield TargetSequence.from_mask(encoded.input_ids, encoded.supervised)
        return
    ids = [int(t) for t in tokenizer(passage)["input_ids"]]
    for start in range(0, len(ids), max_tokens):
        piece = ids[start : start + max_tokens]
        # The first token of a piece has no context, so a piece of one token has nothing to score.
        if len(piece) > 1:
            yield TargetSequence.from_mask(piece, [True] * len(piece))


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


def _rank_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str],
    batch_tokens: int,
    on_progress: _ProgressReporter,
) -> list[RowScore]:
    """Score the rows with the likeliest of the labels."""
    label_index = {label: i for i, label in enumerate(labels)}
    # By row index, because the groups are not scored in the order of the rows.
    scores: dict[int, RowScore] = {}
    for trie, members in _group_by_trie(tokenizer, rows, labels):
        prompts = [chat.prompt_ids(tokenizer, chat.prompt_of(rows[i].messages)) for i in members]
        targets = [label_index.get(chat.answer_of(rows[i].messages)) for i in members]
        rankings = label_ranking.rank_labels(model, trie, prompts, targets, batch_tokens, on_progress)

        # An answer that is not a label is never ranked, so its loss needs a forward pass of its own.
        unlabelled = [n for n, target in enumerate(targets) if target is None]
        items = [_answer_item(tokenizer, rows[members[n]], prompts[n]) for n in unlabelled]
        item_scores = forward.score_sequences(model, items, batch_tokens)
        scored_items = dict(zip(unlabelled, zip(items, item_scores, strict=True), strict=True))

        for n, (i, (best, log_likelihood)) in enumerate(zip(members, rankings, strict=True)):
            row, target = rows[i], targets[n]
            # The ranking has already computed the likelihood of a label.
            if target is None or log_likelihood is None:
                loss, tokens = scored_items[n][1].loss_nats, len(scored_items[n][0].target_ids)
            else:
                loss, tokens = -log_likelihood, int(trie.incidence[target].sum())
            names = slices.slice_names(row.messages, row.language, has_labels=True)
            scores[i] = RowScore(row.id, row.suite, loss, tokens, labels[best], best == target, slices=names)
    return [scores[i] for i in range(len(rows))]


def _with_generated_label(row: Row, score: RowScore, labels: Sequence[str], completions: Mapping[str, str]) -> RowScore:
    """Return the score with the label that the model generated; other text is counted as wrong and not kept."""
    text = completions[row.id].strip()
    predicted = text if text in labels else UNPARSABLE
    return replace(score, predicted=predicted, correct=predicted == chat.answer_of(row.messages))


def _group_by_trie(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], labels: Sequence[str]
) -> Iterator[tuple[Trie, list[int]]]:
    """Group the rows by the trie of the labels' tokens in their template; mostly one trie serves all rows.

    A template could end an answer differently after another kind of prompt. So a trie serves only rows with the same
    roles, and only where the row's own answer has the same tokens in the trie and in its template.
    """
    tries: dict[tuple[str, ...], tuple[list[list[int]], list[int]]] = {}
    label_index = {label: i for i, label in enumerate(labels)}
    for i, row in enumerate(rows):
        prompt, answer = chat.prompt_of(row.messages), chat.answer_of(row.messages)
        roles = tuple(turn["role"] for turn in prompt)
        if roles not in tries:
            tries[roles] = [chat.answer_ids(tokenizer, prompt, label) for label in labels], []
        ids, members = tries[roles]
        # Where this row's answer has other tokens than in the group's trie, the row gets a trie of its own.
        if answer in label_index and ids[label_index[answer]] != chat.answer_ids(tokenizer, prompt, answer):
            yield Trie.from_sequences([chat.answer_ids(tokenizer, prompt, label) for label in labels]), [i]
        else:
            members.append(i)
    for ids, members in tries.values():
        if members:
            yield Trie.from_sequences(ids), members


def _answer_item(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: list[int]) -> TargetSequence:
    """Build the sequence of a row of which only the last answer is scored."""
    ids = chat.answer_ids(tokenizer, chat.prompt_of(row.messages), chat.answer_of(row.messages))
    return TargetSequence.from_mask(prompt + ids, [False] * len(prompt) + [True] * len(ids))
