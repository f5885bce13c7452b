"""How likely a model finds the answers of a data set: one loss a row, and for a closed set of labels its choice.

Reads a loaded model and its tokenizer, chats or plain text. Makes one `RowScore` a row. Labels are ranked by the
likelihood of the whole answer with its end token (`ranking`). Logits are computed only where a token is judged.
Refuses (13) rows and scores that are damaged. Command: none; `evaluate` and `merge_adapter` call it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain import chat, progress, ranking
from qlora_retrain.errors import IntegrityError
from qlora_retrain.ranking import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SECONDS_BETWEEN_UPDATES = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """A chat to be scored."""

    id: str
    suite: str
    messages: chat.Chat


@dataclass(frozen=True, slots=True)
class RowScore:
    """What a model makes of one row.

    Attributes:
        id: The row's id.
        suite: `eval`, `golden` or `reference`.
        loss_nats: Negative log-likelihood, summed over the answer's tokens.
        tokens: How many tokens that sum has.
        predicted: The likeliest label, where there are labels.
        correct: Whether that is the row's answer.
    """

    id: str
    suite: str
    loss_nats: float
    tokens: int
    predicted: str | None = None
    correct: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that are known, fit for JSON: a loss that is not finite becomes null."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | {"loss_nats": self.loss_nats if math.isfinite(self.loss_nats) else None}


@dataclass(frozen=True, slots=True)
class _Item:
    """A sequence of a batch; `at` is where logits are needed, `targets` are the tokens judged there."""

    ids: list[int]
    at: list[int]
    targets: list[int]


def read_rows(path: Path, suite: str) -> list[Row]:
    """The rows of `eval.jsonl` or `golden.jsonl`.

    Raises:
        IntegrityError: If a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(Row(str(row["id"]), suite, row["messages"]))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f'{path.name}:{number}: wanted {{"id", "messages"}}: {error!r}') from error
    return rows


def write_scores(path: Path, scores: Mapping[str, Sequence[RowScore]]) -> None:
    """Write `scores.jsonl`: one line a contestant and row."""
    with path.open("w", encoding="utf-8") as file:
        for contestant, found in scores.items():
            for score in found:
                file.write(json.dumps({"contestant": contestant, **score.as_json()}) + "\n")


def read_scores(path: Path) -> dict[str, list[RowScore]]:
    """The scores of each contestant, in the order written.

    Raises:
        IntegrityError: If a line is not a score.
    """
    scores: dict[str, list[RowScore]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            loss = math.nan if record["loss_nats"] is None else float(record["loss_nats"])
            score = RowScore(**{k: v for k, v in record.items() if k != "contestant"} | {"loss_nats": loss})
            scores.setdefault(record["contestant"], []).append(score)
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path.name}:{number}: not a row's score: {error!r}") from error
    return scores


def attention(device: str) -> str:
    """The attention to score with; it must take a trie's mask, which flash attention does not."""
    return "sdpa" if device == "cuda" else "eager"


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
    """
    tick = _Ticker(what, done, done + len(rows) if total is None else total)
    if labels is None:
        encoded = [chat.encode(tokenizer, row.messages) for row in rows]
        items = [_sequence(found.input_ids, found.supervised) for found in encoded]
        losses = _losses(model, items, batch_tokens, tick)
        return [
            RowScore(row.id, row.suite, loss, len(item.targets))
            for row, loss, item in zip(rows, losses, items, strict=True)
        ]
    index = {label: i for i, label in enumerate(labels)}
    scores: dict[int, RowScore] = {}
    for trie, members in _by_trie(tokenizer, rows, labels):
        prompts = [chat.prompt_ids(tokenizer, chat.prompt_of(rows[i].messages)) for i in members]
        answers = [chat.answer_of(rows[i].messages) for i in members]
        wanted = [index.get(answer) for answer in answers]
        ranked = ranking.rank(model, trie, prompts, wanted, batch_tokens, tick)
        # An answer that is no label can never be chosen; its loss takes a pass of its own.
        lengths = [int(trie.uses[w].sum()) if w is not None else 0 for w in wanted]
        strangers = [n for n, w in enumerate(wanted) if w is None]
        items = [_answer(tokenizer, rows[members[n]], prompts[n]) for n in strangers]
        alone = dict(zip(strangers, zip(items, _losses(model, items, batch_tokens), strict=True), strict=True))
        for n, (i, (best, likelihood)) in enumerate(zip(members, ranked, strict=True)):
            if likelihood is None:
                item, loss = alone[n]
                score = RowScore(rows[i].id, rows[i].suite, loss, len(item.targets), labels[best], False)
            else:
                right = best == wanted[n]
                score = RowScore(rows[i].id, rows[i].suite, -likelihood, lengths[n], labels[best], right)
            scores[i] = score
    return [scores[i] for i in range(len(rows))]


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_tokens: int,
    what: str,
    max_tokens: int = 1024,
    done: int = 0,
    total: int | None = None,
) -> list[RowScore]:
    """Score general text: every token but the first of each piece of at most `max_tokens`, one `RowScore` a text."""
    pieces: list[_Item] = []
    owners: list[int] = []
    for i, text in enumerate(texts):
        ids = [int(t) for t in tokenizer(text)["input_ids"]]
        for start in range(0, len(ids), max_tokens):
            part = ids[start : start + max_tokens]
            if len(part) > 1:
                pieces.append(_sequence(part, [True] * len(part)))
                owners.append(i)
    tick = _Ticker(what, done, done + len(texts) if total is None else total)
    losses, tokens = [0.0] * len(texts), [0] * len(texts)
    for owner, item, loss in zip(owners, pieces, _losses(model, pieces, batch_tokens), strict=True):
        losses[owner] += loss
        tokens[owner] += len(item.targets)
    tick(len(texts))
    return [
        RowScore(hashlib.sha256(text.encode()).hexdigest()[:16], "reference", loss, count)
        for text, loss, count in zip(texts, losses, tokens, strict=True)
    ]


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


def _answer(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: list[int]) -> _Item:
    """A row of which the last answer alone is judged."""
    ids = chat.answer_ids(tokenizer, chat.prompt_of(row.messages), chat.answer_of(row.messages))
    return _sequence(prompt + ids, [False] * len(prompt) + [True] * len(ids))


def _sequence(ids: list[int], judged: Sequence[bool]) -> _Item:
    """A plain sequence; the token at 0 follows nothing, so it is never judged."""
    at = [i - 1 for i in range(1, len(ids)) if judged[i]]
    return _Item(ids[: at[-1] + 1] if at else ids[:1], at, [ids[i + 1] for i in at])


def _losses(
    model: PreTrainedModel, items: Sequence[_Item], batch_tokens: int, tick: _Ticker | None = None
) -> list[float]:
    """The summed loss of every item, in nats."""
    import torch

    losses = [0.0] * len(items)
    for batch in ranking.batches([len(item.ids) for item in items], batch_tokens):
        # Padding stands on the right, where a causal model's judged tokens cannot see it: no mask is needed.
        ids = torch.zeros(len(batch), len(items[batch[0]].ids), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(items[i].ids)] = torch.tensor(items[i].ids)
        at = [(row, position) for row, i in enumerate(batch) for position in items[i].at]
        targets = [(n, token) for n, token in enumerate(token for i in batch for token in items[i].targets)]
        if at:
            with torch.inference_mode():
                values = iter(ranking.logprobs(model, {"input_ids": ids, "use_cache": False}, at, targets))
            for i in batch:
                losses[i] = -math.fsum(next(values) for _ in items[i].targets)
        if tick:
            tick(len(batch))
    return losses
