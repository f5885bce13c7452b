"""Tokenize the training rows, order them, and collate them into padded batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset, Sampler

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import json_lines, progress
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm.chat import Chat, ChatTokenizer, EncodedChat, Message, RowRefused, load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.rendering import Tools

IGNORE_INDEX = -100  # the label of a token without loss, as torch's cross_entropy has it
# Rows are sorted by length within windows of this many global batches: less padding, but still a random order.
SORT_WINDOW_BATCHES = 50
PROGRESS_EVERY_ROWS = 5000
ROWS_AT_ONCE = 500

Example = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


class TokenizedDataset(Dataset[Example]):  # type: ignore[misc]
    """Tokenized chats: `input_ids`, and `labels` that are `IGNORE_INDEX` where there is no loss.

    Attributes:
        row_ids: The name of each row in error messages; never its text.
    """

    def __init__(self, examples: Sequence[Example], row_ids: Sequence[str] | None = None) -> None:
        self.examples = examples
        self.row_ids = row_ids if row_ids is not None else [f"row {i}" for i in range(len(examples))]
        self.lengths = [len(example["input_ids"]) for example in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        # ~i asks for a row without labels: every process must run a forward pass, even where no row is left for it.
        if index < 0:
            return {"input_ids": self.examples[~index]["input_ids"][:1], "labels": [IGNORE_INDEX], "row_index": [-1]}
        return {**self.examples[index], "row_index": [index]}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run, and the token that fills the padding between them."""

    train: TokenizedDataset
    eval: TokenizedDataset
    pad_token_id: int


def read_rows(config: TrainConfig, dataset: Path, base_nf4: Path) -> Rows:
    """Tokenize the files of a data set as the base's chat template writes them.

    Raises:
        UsageError: If there is nothing to train on, or nothing to measure the loss on that the settings ask for.
        IntegrityError: If a line is not a row as `validate_data` writes it.
    """
    tokenizer = load_tokenizer(base_nf4, ChatFormat.from_folder(dataset))
    train = load_tokenized_dataset(dataset / "train.jsonl", tokenizer, config.loss)
    if (replay := dataset / "replay.jsonl").is_file():
        further = load_tokenized_dataset(replay, tokenizer, config.loss)
        train = TokenizedDataset([*train.examples, *further.examples], [*train.row_ids, *further.row_ids])
    held_out = load_tokenized_dataset(dataset / "eval.jsonl", tokenizer, config.loss)
    if config.num_evals and not len(held_out):
        raise UsageError(
            "train.num_evals: dataset/eval.jsonl has no rows to measure the loss on; leave the setting out"
        )
    if not len(train):
        raise UsageError("dataset/train.jsonl has no rows; there is nothing to train on")
    return Rows(train, held_out, tokenizer.pad_token_id)


def refuse_longer_rows(rows: Rows, max_tokens: int | None, num_virtual_tokens: int = 0) -> None:
    """Refuse a row that has more tokens than the model takes; None: it takes any number.

    Args:
        rows: The rows.
        max_tokens: What the model takes.
        num_virtual_tokens: Those that stand before each row.

    Raises:
        UsageError: With the file and the length of its longest row.
    """
    for file, dataset in (("train.jsonl", rows.train), ("eval.jsonl", rows.eval)):
        longest_row = max(dataset.lengths, default=0)
        if max_tokens and longest_row + num_virtual_tokens > max_tokens:
            virtual = f" beside {num_virtual_tokens} virtual ones" if num_virtual_tokens else ""
            raise UsageError(
                f"dataset/{file}: a row has {longest_row} tokens, but the model takes at most {max_tokens}{virtual}; "
                "lower data.max_length_tokens"
            )


def load_tokenized_dataset(
    path: Path, tokenizer: ChatTokenizer, loss: Literal["answers", "all"] = "answers"
) -> TokenizedDataset:
    """Tokenize every row of a dataset file.

    Args:
        path: `train.jsonl` or `eval.jsonl`.
        tokenizer: The base's, with the line's chat format.
        loss: Whether only the answers' tokens have a loss, or all tokens of the row.

    Returns:
        One example for each row; several where the chat template rewrites earlier turns, each with its own answer.

    Raises:
        IntegrityError: If a line is not a row as `validate_data` writes it, or the chat template refuses it.
        UsageError: If a row has no supervised token, which means a wrong mask, template or tokenizer.
    """
    examples: list[Example] = []
    row_ids: list[str] = []
    rows = json_lines.read(path)
    num_read = 0
    # Many rows in one call of the tokenizer, which costs less than row by row.
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        for location, row_id, encoded in _encode_rows(path, chunk, tokenizer, loss):
            labelled = [_with_labels(example, location) for example in encoded]
            if not labelled:
                raise UsageError(f"{location}: no supervised token; every row needs an assistant turn with text")
            examples += labelled
            row_ids += [row_id] if len(labelled) == 1 else [f"{row_id} turn {i + 1}" for i in range(len(labelled))]
        num_read += len(chunk)
        if num_read // PROGRESS_EVERY_ROWS > (num_read - len(chunk)) // PROGRESS_EVERY_ROWS:
            progress.say(f"{path.name}: {num_read} rows tokenized")
    if len(examples) > num_read:
        progress.say(
            f"{path.name}: {num_read} rows give {len(examples)} examples, one for each answer where the chat template "
            "writes earlier turns in another way than the last one"
        )
    return TokenizedDataset(examples, row_ids)


def _encode_rows(
    path: Path, chunk: Sequence[tuple[int, Any]], tokenizer: ChatTokenizer, loss: Literal["answers", "all"]
) -> Iterator[tuple[str, str, list[EncodedChat]]]:
    """Yield the place, the id and the examples of each row, with what has a loss as what is supervised."""
    locations = [f"dataset/{path.name}:{line_number}" for line_number, _ in chunk]
    row_ids, chats = [], []
    for location, (_, row) in zip(locations, chunk, strict=True):
        try:
            row_ids.append(str(row["id"]))
            chats.append((_checked_chat(row["messages"]), row.get("tools")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{location}: not a row that validate_data writes: {error!r}") from error

    for location, row_id, chat, encoded in zip(locations, row_ids, chats, tokenizer.encode_many(chats), strict=True):
        if isinstance(encoded, RowRefused):
            raise IntegrityError(
                f"{location}: validate_data let the row in, and now {encoded.detail}; the data set was made with "
                "another base model or chat template: run validate_data again"
            ) from encoded
        yield (
            location,
            row_id,
            [_all_supervised(tokenizer, *chat, encoded[-1])] if loss == "all" and encoded else encoded,
        )


def _all_supervised(tokenizer: ChatTokenizer, chat: Chat, tools: Tools, encoded: EncodedChat) -> EncodedChat:
    """Return a row's last example, the whole chat, with every token supervised but those of turns of weight 0."""
    is_unweighted = [False] * len(encoded.input_ids)
    if any(turn.get("weight", 1) == 0 for turn in chat):
        weighted = tokenizer.encode([{**turn, "weight": 1} for turn in chat], tools)[-1]
        pairs = zip(encoded.supervised, weighted.supervised, strict=False)
        is_unweighted = [in_weighted and not is_supervised for is_supervised, in_weighted in pairs]
    return replace(encoded, supervised=[not unweighted for unweighted in is_unweighted])


def _checked_chat(messages: Any) -> list[Message]:
    return [{**turn, "role": str(turn["role"]), "content": turn["content"]} for turn in messages]


def _with_labels(encoded: EncodedChat, location: str) -> Example:
    """Return an example whose labels are its tokens where there is a loss."""
    labels = [
        token if is_supervised else IGNORE_INDEX
        for token, is_supervised in zip(encoded.input_ids, encoded.supervised, strict=True)
    ]
    # The first label does not count, since no position before it could predict it.
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise UsageError(f"{location}: no supervised token; every row needs an assistant turn with text")
    return {"input_ids": encoded.input_ids, "labels": labels}


@dataclass(frozen=True, slots=True)
class PaddingCollator:
    """Collate B rows into a batch, padded on the right to its longest row.

    Attributes:
        pad_token_id: The token that fills the padding; the attention mask hides it.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return `input_ids`, `attention_mask` and `labels`, each (B, longest row), and `row_indices` (B,)."""
        longest_row = max(len(example["input_ids"]) for example in examples)

        def pad_rows(name: str, value: int) -> torch.Tensor:
            return torch.tensor([example[name] + [value] * (longest_row - len(example[name])) for example in examples])

        attention_mask = torch.tensor(
            [[1] * len(example["input_ids"]) + [0] * (longest_row - len(example["input_ids"])) for example in examples]
        )
        row_indices = torch.tensor([row for example in examples for row in example.get("row_index", [-1])])
        labels = pad_rows("labels", IGNORE_INDEX)
        return {
            "input_ids": pad_rows("input_ids", self.pad_token_id),
            "attention_mask": attention_mask,
            "labels": labels,
            "row_indices": row_indices,
        }


class LengthGroupedSampler(Sampler[int]):  # type: ignore[misc]
    """Yield every row once per epoch, with rows of similar length in one optimizer step.

    The order is a function of (seed, epoch) alone, so a resumed run needs no saved state. Rows are grouped by whole
    optimizer steps, so the order does not depend on how a step is split into micro-batches.
    """

    def __init__(self, lengths: Sequence[int], global_batch_size: int, seed: int) -> None:
        self.lengths, self.global_batch_size, self.seed = lengths, global_batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next; called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")  # noqa: S311 (an order, not a secret)
        indices = list(range(len(self.lengths)))
        rng.shuffle(indices)

        # The longest rows come first in each window. Batches are shuffled below, so lengths do not shrink over the run.
        batches: list[list[int]] = []
        for start in range(0, len(indices), SORT_WINDOW_BATCHES * self.global_batch_size):
            window = sorted(
                indices[start : start + SORT_WINDOW_BATCHES * self.global_batch_size], key=lambda i: -self.lengths[i]
            )
            batches += [window[i : i + self.global_batch_size] for i in range(0, len(window), self.global_batch_size)]

        # A batch that is not full stays last, since `DistributedBatchSampler` cuts batches by counting rows.
        last_partial = batches.pop() if batches and len(batches[-1]) < self.global_batch_size else []
        rng.shuffle(batches)
        return chain(*batches, last_partial)


class DistributedBatchSampler(Sampler[list[int]]):  # type: ignore[misc]
    """Yield the rows of one process in each optimizer step; the steps do not depend on the number of processes.

    The rows of a step, sorted by length, are dealt to the processes in snake order, so that all get about as many
    tokens. Where a step has fewer rows than processes, some processes get a row without labels (`~index`).
    """

    def __init__(self, sampler: LengthGroupedSampler, rank: int = 0, world_size: int = 1) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called before each one."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.sampler.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows, n = iter(self.sampler), self.world_size
        while batch := list(islice(rows, self.sampler.global_batch_size)):
            # Ranks in snake order: 0 1 2 2 1 0 0 1 2 ...
            own_rows = [row for i, row in enumerate(batch) if self.rank == min(i % (2 * n), 2 * n - 1 - i % (2 * n))]
            yield own_rows or [~batch[0]]
