"""Tokenize the rows that contestants are scored on; a row that the model's chat template refuses is named.

The data gate has let every row in by the line's own template, so a refusal means that the inputs do not belong together
(13). A published version has a template of its own, which may refuse rows that the line's new template carries:
`refusals` tells these apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation.rows import Row
from qlora_retrain.lm import conversations
from qlora_retrain.lm.chat import ChatTokenizer, EncodedChat, RowRefused
from qlora_retrain.lm.forward import TargetSequence


def examples(tokenizer: ChatTokenizer, rows: Sequence[Row]) -> list[list[EncodedChat]]:
    """Tokenize every row: one example, or several where the template rewrites earlier turns.

    Raises:
        IntegrityError: If the template refuses a row.
    """
    encoded = tokenizer.encode_many([(row.messages, row.tools) for row in rows])
    result: list[list[EncodedChat]] = []
    for row, row_examples in zip(rows, encoded, strict=True):
        if isinstance(row_examples, RowRefused):
            raise _error(row, row_examples) from row_examples
        result.append(row_examples)
    return result


def refusals(tokenizer: ChatTokenizer, rows: Sequence[Row]) -> list[RowRefused | None]:
    """Return for each row why the template refuses it; None where it carries it."""
    encoded = tokenizer.encode_many([(row.messages, row.tools) for row in rows])
    return [item if isinstance(item, RowRefused) else None for item in encoded]


def split(tokenizer: ChatTokenizer, row: Row, label: str | None = None) -> tuple[list[int], list[int]]:
    """Return the tokens of a row's prompt, and those of its answer with its end.

    Args:
        tokenizer: The model's.
        row: The row.
        label: An answer of plain text in place of the row's own turn.

    Raises:
        IntegrityError: If the template refuses the row.
    """
    answer = conversations.answer_turn(row.messages) if label is None else label
    with naming_refused(row):
        if answer is None:
            raise RowRefused("no_assistant_turn", "there is no assistant turn")
        return tokenizer.split(conversations.prompt_of(row.messages), answer, row.tools)


def answer_sequence(prompt: Sequence[int], answer: Sequence[int]) -> TargetSequence:
    """Build the sequence of a row of which only the last answer is scored."""
    return TargetSequence.from_mask([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


@contextmanager
def naming_refused(row: Row) -> Iterator[None]:
    """Turn a refusal of the template into an error that names the row.

    Raises:
        IntegrityError: If the template refuses the row.
    """
    try:
        yield
    except RowRefused as refusal:
        raise _error(row, refusal) from refusal


def _error(row: Row, refusal: RowRefused) -> IntegrityError:
    return IntegrityError(
        f"dataset/{row.suite}.jsonl: the row {row.id} was let in by validate_data, and now {refusal.detail}; the data "
        "set was made with another base model or chat template: run validate_data again"
    )
