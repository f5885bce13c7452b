"""Training rows as tokens and labels, and the order in which they are seen."""

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

IGNORED = -100  # the label of a token that is not learned; cross entropy's own convention
WINDOW = 50  # batches among which rows are sorted by length: less padding, the rest of the order stays random
UPDATE_EVERY = 5000

Item = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


class Rows(Dataset[Item]):  # type: ignore[misc]
    """Encoded chats: `input_ids`, and `labels` that are `IGNORED` where the model is not to learn.

    Attributes:
        ids: What names a row in an error; never its text.
    """

    def __init__(self, items: Sequence[Item], ids: Sequence[str] | None = None) -> None:
        self.items = items
        self.ids = ids if ids is not None else [f"row {i}" for i in range(len(items))]
        self.lengths = [len(item["input_ids"]) for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        if index < 0:  # a pass with nothing to learn, for a process for which no row is left
            return {"input_ids": self.items[~index]["input_ids"][:1], "labels": [IGNORED], "row": [-1]}
        return {**self.items[index], "row": [index]}


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Encode every row of a dataset file.

    Raises:
        IntegrityError: If a line is not a row as `validate_data` writes it.
        UsageError: If a row has no token to learn: the mask, the template or the tokenizer would be wrong.
    """
    items: list[Item] = []
    ids: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"dataset/{path.name}:{number}"
            try:
                messages = json.loads(line)["messages"]
                encoded = chat.encode(tokenizer, messages)
                ids.append(chat.row_id(messages) if encoded.input_ids else "")
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(f"{where}: not a row of a dataset: {error!r}") from error
            labels = [
                token if learn else IGNORED for token, learn in zip(encoded.input_ids, encoded.supervised, strict=True)
            ]
            if all(label == IGNORED for label in labels[1:]):  # nothing precedes the first token to predict it from
                raise UsageError(f"{where}: no supervised token; every row needs an assistant turn that says something")
            items.append({"input_ids": encoded.input_ids, "labels": labels})
            if number % UPDATE_EVERY == 0:
                progress.say(f"{path.name}: {number} rows encoded")
    return Rows(items, ids)


@dataclass(frozen=True, slots=True)
class Collate:
    """Make a batch, padded on the right to its longest row.

    Attributes:
        pad: The token to pad with; the attention mask hides it.
    """

    pad: int

    def __call__(self, items: Sequence[Item]) -> Batch:
        """`input_ids`, `attention_mask` and `labels`, each (rows, longest row); `rows`, their numbers."""
        longest = max(len(item["input_ids"]) for item in items)

        def filled(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([item[name] + [filler] * (longest - len(item[name])) for item in items])

        mask = torch.tensor([[1] * len(item["input_ids"]) + [0] * (longest - len(item["input_ids"])) for item in items])
        rows = torch.tensor([number for item in items for number in item.get("row", [-1])])
        labels = filled("labels", IGNORED)
        return {"input_ids": filled("input_ids", self.pad), "attention_mask": mask, "labels": labels, "rows": rows}


class Order(Sampler[int]):  # type: ignore[misc]
    """Every row once an epoch, rows of like length in one optimizer step; a function of (seed, epoch) and nothing else.

    Rows are grouped by whole optimizer steps, so the order does not depend on how a step is cut into forward passes,
    and a resumed run needs no state to find it again.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self.lengths, self.rows_per_step, self.seed = lengths, rows_per_step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")  # noqa: S311 (an order, not a secret)
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        steps: list[list[int]] = []
        for start in range(0, len(order), WINDOW * self.rows_per_step):
            window = sorted(order[start : start + WINDOW * self.rows_per_step], key=lambda i: -self.lengths[i])
            steps += [window[i : i + self.rows_per_step] for i in range(0, len(window), self.rows_per_step)]
        partial = steps.pop() if steps and len(steps[-1]) < self.rows_per_step else []
        rng.shuffle(steps)
        return chain(*steps, partial)


class Steps(Sampler[list[int]]):  # type: ignore[misc]
    """The rows of one process in each optimizer step; the steps are those of the order, whoever shares them.

    The rows of a step, which are of like length, are dealt out to and fro, so that the processes get equally many
    tokens. Where there are fewer rows than processes, some see a row (`~index`) from which nothing is learnt.
    """

    def __init__(self, order: Order, process: int = 0, processes: int = 1) -> None:
        self.order, self.process, self.processes = order, process, processes

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.order.rows_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        rows, n = iter(self.order), self.processes
        while step := list(islice(rows, self.order.rows_per_step)):
            # 0 1 2 2 1 0 0 1 2 ...
            mine = [row for i, row in enumerate(step) if self.process == min(i % (2 * n), 2 * n - 1 - i % (2 * n))]
            yield mine or [~step[0]]
