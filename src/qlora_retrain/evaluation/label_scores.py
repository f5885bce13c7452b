"""Score rows whose answers are a closed set: the likeliest label, and the loss of the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_retrain.evaluation import row_tokens, slices
from qlora_retrain.evaluation.rows import Row, RowScore
from qlora_retrain.lm import conversations, forward, label_by_label, label_ranking
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class _Group:
    """Rows whose labels have the same tokens.

    Attributes:
        label_ids: The tokens of each label, with its end.
        members: The indices of the rows.
        prompts: The tokens of each member's prompt.
    """

    label_ids: list[list[int]]
    members: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)


def rank_labels(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    labels: Sequence[str],
    batch_tokens: int,
    on_progress: Callable[[int], None],
) -> list[RowScore]:
    """Score the rows with the likeliest of the labels, in the order of the rows."""
    label_index = {label: i for i, label in enumerate(labels)}
    # By row index, because the groups are not scored in the order of the rows.
    scores: dict[int, RowScore] = {}
    for group in _groups(tokenizer, rows, labels):
        trie = Trie.from_sequences(group.label_ids)
        targets = [label_index.get(conversations.answer_of(rows[i].messages)) for i in group.members]
        rankings = _rank_group(model, group, trie, targets, batch_tokens, on_progress)

        # An answer that is not a label is never ranked, so its loss needs a forward pass of its own.
        unlabelled = [n for n, target in enumerate(targets) if target is None]
        items = [row_tokens.answer_sequence(*row_tokens.split(tokenizer, rows[group.members[n]])) for n in unlabelled]
        item_scores = forward.score_sequences(model, items, batch_tokens)
        scored_items = dict(zip(unlabelled, zip(items, item_scores, strict=True), strict=True))

        for n, (i, (best, log_likelihood)) in enumerate(zip(group.members, rankings, strict=True)):
            row, target = rows[i], targets[n]
            # The ranking has already computed the likelihood of a label.
            if target is None or log_likelihood is None:
                loss, tokens = scored_items[n][1].loss_nats, len(scored_items[n][0].target_ids)
            else:
                loss, tokens = -log_likelihood, int(trie.incidence[target].sum())
            names = slices.slice_names(row.messages, row.language, has_labels=True)
            scores[i] = RowScore(
                row.id,
                row.suite,
                loss,
                tokens,
                labels[best],
                best == target,
                slices=names,
                prompt_id=row.prompt_id,
            )
    return [scores[i] for i in range(len(rows))]


def _rank_group(
    model: PreTrainedModel,
    group: _Group,
    trie: Trie,
    targets: Sequence[int | None],
    batch_tokens: int,
    on_progress: Callable[[int], None],
) -> list[tuple[int, float | None]]:
    """Rank the labels for each member: all at once where that is exact, else one by one."""
    max_prompt_tokens = label_by_label.max_tree_tokens(model) - max(map(len, group.label_ids))
    is_exact = [len(prompt) <= max_prompt_tokens for prompt in group.prompts]

    def select(values: Sequence[Any], *, exact: bool) -> list[Any]:
        return [value for value, flag in zip(values, is_exact, strict=True) if flag is exact]

    at_once = iter(
        label_ranking.rank_labels(
            model, trie, select(group.prompts, exact=True), select(targets, exact=True), batch_tokens, on_progress
        )
    )
    one_by_one = iter(
        label_by_label.rank_labels(
            model,
            group.label_ids,
            select(group.prompts, exact=False),
            select(targets, exact=False),
            batch_tokens,
            on_progress,
        )
    )
    return [next(at_once if flag else one_by_one) for flag in is_exact]


def longest_label(tokenizer: ChatTokenizer, row: Row, labels: Sequence[str]) -> int:
    """Return the number of tokens of the longest label with its end, after the prompt of this row."""
    return max(len(row_tokens.split(tokenizer, row, label)[1]) for label in labels)


def _groups(tokenizer: ChatTokenizer, rows: Sequence[Row], labels: Sequence[str]) -> Iterator[_Group]:
    """Group the rows by the tokens of the labels in their template; mostly one group has all rows.

    A template could end an answer differently after another kind of prompt. So a group has only rows with the same
    roles, and only where the row's own answer has the same tokens in the group and in its template.
    """
    groups: dict[tuple[str, ...], _Group] = {}
    label_index = {label: i for i, label in enumerate(labels)}
    for i, row in enumerate(rows):
        answer = conversations.answer_of(row.messages)
        prompt, answer_ids = row_tokens.split(tokenizer, row, answer if answer in label_index else labels[0])
        roles = tuple(turn["role"] for turn in conversations.prompt_of(row.messages))
        if roles not in groups:
            groups[roles] = _Group([row_tokens.split(tokenizer, row, label)[1] for label in labels])

        # Where this row's answer has other tokens than in the group, the row gets a group of its own.
        group = groups[roles]
        if answer in label_index and group.label_ids[label_index[answer]] != answer_ids:
            yield _Group([row_tokens.split(tokenizer, row, label)[1] for label in labels], [i], [prompt])
        else:
            group.members.append(i)
            group.prompts.append(prompt)
    yield from (group for group in groups.values() if group.members)
