"""Tokenize the training rows, order them, and collate them into padded batches."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import chat

IGNORE_INDEX = -100  # the label of a token without loss, as torch's cross_entropy has it
# Rows are sorted by length within windows of this many global batches: less padding, but still a random order.
SORT_WINDOW_BATCHES = 50
PROGRESS_EVERY_ROWS = 5000

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


def load_tokenized_dataset(path: Path, tokenizer: PreTrainedTokenizerBase) -> TokenizedDataset:
    """Tokenize every row of a dataset file.

    Raises:
        IntegrityError: If a line is not a row as `validate_data` writes it.
        UsageError: If a row has no supervised token, which means a wrong mask, template or tokenizer.
    """
    examples: list[Example] = []
    row_ids: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, start=1):
            location = f"dataset/{path.name}:{line_number}"
            try:
                messages = json.loads(line)["messages"]
                encoded = chat.encode(tokenizer, messages)
                row_ids.append(chat.row_id(messages) if encoded.input_ids else "")
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(f"{location}: not a row that validate_data writes: {error!r}") from error

            labels = [
                token if is_supervised else IGNORE_INDEX
                for token, is_supervised in zip(encoded.input_ids, encoded.supervised, strict=True)
            ]
            # The first label does not count, since no position before it could predict it.
            if all(label == IGNORE_INDEX for label in labels[1:]):
                raise UsageError(f"{location}: no supervised token; every row needs an assistant turn with text")
            examples.append({"input_ids": encoded.input_ids, "labels": labels})
            if line_number % PROGRESS_EVERY_ROWS == 0:
                progress.say(f"{path.name}: {line_number} rows tokenized")
    return TokenizedDataset(examples, row_ids)


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
        """Set the epoch; the Trainer calls this before each one."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.sampler.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows, n = iter(self.sampler), self.world_size
        while batch := list(islice(rows, self.sampler.global_batch_size)):
            # Ranks in snake order: 0 1 2 2 1 0 0 1 2 ...
            own_rows = [row for i, row in enumerate(batch) if self.rank == min(i % (2 * n), 2 * n - 1 - i % (2 * n))]
            yield own_rows or [~batch[0]]
