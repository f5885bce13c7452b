"""How likely a model finds the answers of a data set: one loss a row, and for a closed set of labels its choice.

Reads a loaded model and its tokenizer, chats or plain text. Makes one `RowScore` a row. Labels are ranked by the
likelihood of the whole answer with its end token (`ranking`). Logits are computed only where a token is judged.
Refuses (13) rows and scores that are damaged. Command: none; `evaluate` and `merge_adapter` call it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import reference_text, slices
from qlora_retrain.evaluation.metrics import texts as written_texts
from qlora_retrain.evaluation.reference_text import Passage
from qlora_retrain.evaluation.rows import UNPARSABLE as UNPARSABLE
from qlora_retrain.evaluation.rows import Row as Row
from qlora_retrain.evaluation.rows import RowScore as RowScore
from qlora_retrain.evaluation.rows import read_rows as read_rows
from qlora_retrain.evaluation.rows import read_scores as read_scores
from qlora_retrain.evaluation.rows import write_scores as write_scores
from qlora_retrain.lm import chat, forward, generation, label_ranking
from qlora_retrain.lm.forward import Item
from qlora_retrain.lm.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SECONDS_BETWEEN_UPDATES = 1.0


def attention(device: str) -> str:
    """The attention to score with; it must take a trie's mask, which flash attention does not."""
    return "sdpa" if device == "cuda" else "eager"


def score_by(
    settings: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    show_golden: bool = False,
    **how: Any,
) -> tuple[list[RowScore], dict[str, str]]:
    """Score every row as a line's settings want it: `score_rows`, and what the model writes where that is measured.

    Returns:
        The scores, and the texts by row id: of all rows where a metric is of what is written; else of the golden rows
        where `show_golden` is set; else none.
    """
    wanted = [row for row in rows if settings.writes or (show_golden and row.suite == "golden")]
    prompts = [chat.prompt_ids(tokenizer, chat.prompt_of(row.messages)) for row in wanted]
    found = generation.write(model, tokenizer, prompts, settings.max_new_tokens, settings.batch_tokens)
    written = {row.id: text for row, text in zip(wanted, found, strict=True)}
    how["batch_tokens"] = settings.batch_tokens
    if labels is not None and settings.labels_by == "generation":
        scores = score_rows(model, tokenizer, rows, labels=None, last_answer_only=True, **how)
        scores = [_as_written(row, score, labels, written) for row, score in zip(rows, scores, strict=True)]
    else:
        scores = score_rows(model, tokenizer, rows, labels=labels, **how)
    if settings.writes:
        scores = [
            replace(
                s, values=written_texts.measure(settings.written_metrics, chat.answer_of(r.messages), written[r.id])
            )
            for r, s in zip(rows, scores, strict=True)
        ]
    return scores, written


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    labels: Sequence[str] | None,
    batch_tokens: int,
    what: str,
    done: int = 0,
    total: int | None = None,
    last_answer_only: bool = False,
) -> list[RowScore]:
    """Score every row, in the order given.

    Args:
        model: In evaluation mode; plain, 4-bit or with an adapter; eager or sdpa attention.
        tokenizer: The model's own.
        rows: Chats whose last turn is the answer.
        labels: The closed set of answers, ranked by the likelihood of the whole answer with its end token; None:
            score the tokens of every assistant turn and choose nothing.
        batch_tokens: Tokens of a forward pass, padding included; a longer row goes alone.
        what: The work's name for the progress line.
        done: Rows finished before these, for the progress line.
        total: Rows in all, for the progress line; None: just these.
        last_answer_only: Without labels: score only the last assistant turn.
    """
    tick = _Ticker(what, done, done + len(rows) if total is None else total)
    if labels is not None:
        return _ranked(model, tokenizer, rows, labels, batch_tokens, tick)
    if last_answer_only:
        items = [_answer(tokenizer, r, chat.prompt_ids(tokenizer, chat.prompt_of(r.messages))) for r in rows]
    else:
        encoded = [chat.encode(tokenizer, row.messages) for row in rows]
        items = [Item.of(found.input_ids, found.supervised) for found in encoded]
    judged = forward.judge(model, items, batch_tokens, tick)
    return [
        RowScore(
            row.id,
            row.suite,
            found.loss_nats,
            len(item.targets),
            slices=slices.of(row.messages, row.language, labelled=last_answer_only),
        )
        for row, found, item in zip(rows, judged, items, strict=True)
    ]


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Passage],
    *,
    batch_tokens: int,
    what: str,
    max_tokens: int = 1024,
    done: int = 0,
    total: int | None = None,
) -> list[RowScore]:
    """Score general passages, one `RowScore` each, with how many tokens the model would have chosen itself.

    Of a text every token is judged but the first of each piece of at most `max_tokens`; of a chat the assistant's.
    """
    pieces: list[Item] = []
    owners: list[int] = []
    for i, passage in enumerate(texts):
        found = list(_pieces(tokenizer, passage, max_tokens))
        pieces += found
        owners += [i] * len(found)
    tick = _Ticker(what, done, done + len(texts) if total is None else total)
    losses, tokens, hits = [0.0] * len(texts), [0] * len(texts), [0] * len(texts)
    for owner, item, judged in zip(owners, pieces, forward.judge(model, pieces, batch_tokens), strict=True):
        losses[owner] += judged.loss_nats
        tokens[owner] += len(item.targets)
        hits[owner] += judged.hits
    tick(len(texts))
    return [
        RowScore(reference_text.passage_id(passage), "reference", loss, count, hits=hit)
        for passage, loss, count, hit in zip(texts, losses, tokens, hits, strict=True)
    ]


def _pieces(tokenizer: PreTrainedTokenizerBase, passage: Passage, max_tokens: int) -> Iterator[Item]:
    if not isinstance(passage, str):
        encoded = chat.encode(tokenizer, passage)
        yield Item.of(encoded.input_ids, encoded.supervised)
        return
    ids = [int(t) for t in tokenizer(passage)["input_ids"]]
    for start in range(0, len(ids), max_tokens):
        part = ids[start : start + max_tokens]
        if len(part) > 1:
            yield Item.of(part, [True] * len(part))


class _Ticker:
    """Tells the progress, at most once a second and at the end."""

    def __init__(self, what: str, done: int, total: int) -> None:
        self.what, self.done, self.total = what, done, total
        self.said = time.monotonic()

    def __call__(self, more: int) -> None:
        self.done += more
        if self.done == self.total or time.monotonic() - self.said > _SECONDS_BETWEEN_UPDATES:
            self.said = time.monotonic()
            progress.update(self.what, self.done, self.total)


def _ranked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str],
    batch_tokens: int,
    tick: _Ticker,
) -> list[RowScore]:
    """The rows with the likeliest of the labels."""
    index = {label: i for i, label in enumerate(labels)}
    scores: dict[int, RowScore] = {}
    for trie, members in _by_trie(tokenizer, rows, labels):
        prompts = [chat.prompt_ids(tokenizer, chat.prompt_of(rows[i].messages)) for i in members]
        wanted = [index.get(chat.answer_of(rows[i].messages)) for i in members]
        ranked = label_ranking.rank(model, trie, prompts, wanted, batch_tokens, tick)
        # An answer that is no label can never be chosen; its loss takes a pass of its own.
        strangers = [n for n, w in enumerate(wanted) if w is None]
        items = [_answer(tokenizer, rows[members[n]], prompts[n]) for n in strangers]
        alone = dict(zip(strangers, zip(items, forward.judge(model, items, batch_tokens), strict=True), strict=True))
        for n, (i, (best, likelihood)) in enumerate(zip(members, ranked, strict=True)):
            want = wanted[n]
            if want is None or likelihood is None:
                loss, tokens = alone[n][1].loss_nats, len(alone[n][0].targets)
            else:
                loss, tokens = -likelihood, int(trie.uses[want].sum())
            of = slices.of(rows[i].messages, rows[i].language, labelled=True)
            scores[i] = RowScore(rows[i].id, rows[i].suite, loss, tokens, labels[best], best == want, slices=of)
    return [scores[i] for i in range(len(rows))]


def _as_written(row: Row, score: RowScore, labels: Sequence[str], written: Mapping[str, str]) -> RowScore:
    """The score with the label that the model wrote; what is no label is never right, and never shown."""
    text = written[row.id].strip()
    predicted = text if text in labels else UNPARSABLE
    return replace(score, predicted=predicted, correct=predicted == chat.answer_of(row.messages))


def _by_trie(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], labels: Sequence[str]
) -> Iterator[tuple[Trie, list[int]]]:
    """The rows by the trie of what the labels are in their template: almost always one for all.

    A template could end an answer differently after another kind of prompt, so a trie serves only rows with the same
    roles, and of those only rows whose own answer it holds as the template writes it.
    """
    tries: dict[tuple[str, ...], tuple[list[list[int]], list[int]]] = {}
    index = {label: i for i, label in enumerate(labels)}
    for i, row in enumerate(rows):
        prompt, answer = chat.prompt_of(row.messages), chat.answer_of(row.messages)
        roles = tuple(turn["role"] for turn in prompt)
        if roles not in tries:
            tries[roles] = [chat.answer_ids(tokenizer, prompt, label) for label in labels], []
        ids, members = tries[roles]
        if answer in index and ids[index[answer]] != chat.answer_ids(tokenizer, prompt, answer):
            yield Trie.of([chat.answer_ids(tokenizer, prompt, label) for label in labels]), [i]
        else:
            members.append(i)
    for ids, members in tries.values():
        if members:
            yield Trie.of(ids), members


def _answer(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: list[int]) -> Item:
    """A row of which the last answer alone is judged."""
    ids = chat.answer_ids(tokenizer, chat.prompt_of(row.messages), chat.answer_of(row.messages))
    return Item.of(prompt + ids, [False] * len(prompt) + [True] * len(ids))
