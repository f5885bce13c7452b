"""Keep rows out of training that nearly equal an evaluation or a golden row, and find those that nearly equal another.

Rows are compared by what the user says in them; by all of their text where there is no user. Two rows of training are
near-duplicates only where their answers are alike too: two answers to one question are two examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from components.validate_data.checks import Row
from components.validate_data.near_duplicates import find_near_duplicates
from components.validate_data.text_words import POLITE_WORDS, cut_words, similarity
from qlora_retrain.config.data import DataConfig
from qlora_retrain.evaluation import slices
from qlora_retrain.lm import conversations

CHECKS = ("near_evaluation", "near_duplicates")


class Texts(Sequence[str]):
    """The texts of rows, each made when it is asked for, so that no second copy of the data is in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self._rows[index])
        messages = self._rows[index].messages
        return slices.user_text(messages) or "\n".join(map(conversations.turn_text, messages))


def check_similar_rows(rows: Sequence[Row], golden: Sequence[Row], config: DataConfig) -> None:
    """Note which training rows nearly equal another row, and take those out of training that a check drops.

    Args:
        rows: The rows with their sides of the split.
        golden: The golden rows.
        config: The checks and the threshold.
    """
    enabled = [name for name in CHECKS if config.checks[name] != "off"]
    if not enabled:
        return

    # Rows beyond `max_eval_rows` come back to the evaluation with a higher limit, so they are reserved as well; and so
    # are rows that were evaluated before.
    train = [row for row in rows if row.split == "train"]
    # The first of a cluster stays, so the order of the files would decide which row is learnt.
    if config.checks["near_duplicates"] == "drop":
        train.sort(key=lambda row: conversations.row_id(*row.chat_and_tools))
    reserved = [row for row in rows if row.split in ("eval", "dropped") or row.reason == "evaluated_before"]
    reserved += golden
    compared = train + (reserved if "near_evaluation" in enabled else [])
    is_reserved = [i >= len(train) for i in range(len(compared))]
    similar = find_near_duplicates(
        Texts(compared), config.near_duplicate_threshold, is_reserved, config.near_evaluation_threshold, POLITE_WORDS
    )

    for i, row in enumerate(train):
        first = train[similar.first_rows[i]]
        if similar.reserved_rows[i] >= 0:
            _note(row, "near_evaluation", config)
        elif "near_duplicates" in enabled and first is not row and _has_similar_answer(row, first, config):
            _note(row, "near_duplicates", config)


def _note(row: Row, name: str, config: DataConfig) -> None:
    row.hits += (name,)
    if config.checks[name] in ("drop", "refuse"):
        row.reason, row.split = name, None


def _has_similar_answer(row: Row, first: Row, config: DataConfig) -> bool:
    answer, first_answer = conversations.answer_of(row.messages), conversations.answer_of(first.messages)
    if config.task == "labels":
        return answer == first_answer
    return similarity(cut_words(answer), cut_words(first_answer)) >= config.near_duplicate_threshold
