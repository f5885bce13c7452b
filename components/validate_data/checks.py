"""Turn raw rows into chats of one schema, with their lengths in tokens; each fault of a row has a reason code.

A chat is a list of `{"role": system|user|assistant, "content": text}`. It has at most one system turn, at the start;
then user and assistant in turn, the assistant last. Rows are quarantined, never repaired and never truncated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from components.validate_data.raw_rows import RawRow, required_fields
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The clause of a message for each reason; {field} and {limit} are filled in.
REASONS = {
    "missing_field": "{field} has no value",
    "not_an_object": "the line is JSON but not an object with fields; expected {field} in an object",
    "ragged_row": "the row has more or fewer fields than the header; quote fields that hold commas or line breaks",
    "bad_json": "{field} holds text that is not JSON; expected a list of turns",
    "not_a_list": "{field} is not a list of turns",
    "not_a_turn": "{field} holds a turn that is not an object with a role and a content",
    "extra_field": "{field} holds a turn with more fields than role and content; the others would be lost",
    "unknown_role": "{field} holds a role other than system, user and assistant",
    "bad_content_type": "{field} holds a content that is not text",
    "empty_content": "{field} holds a turn without text",
    "bad_unicode": "{field} holds half of a surrogate pair, which is not valid text",
    "special_token": "{field} holds a special token of the tokenizer as text, which the model would read as markup",
    "no_assistant_turn": "{field} has no assistant turn; a conversation needs a user turn and an assistant turn",
    "no_final_answer": "{field} does not end with an assistant turn",
    "wrong_order": "{field} has its turns out of order; expected system (or none), then user and assistant in turn",
    "too_long": "the chat is longer than data.max_length_tokens = {limit}; rows are never truncated",
    "no_supervised_tokens": "the chat template leaves no token of the answer to train on",
    "conflicting_answer": "another row has the same prompt with another label, so neither can be trusted",
    "exact_duplicate": "an earlier row has the same prompt and the same answer",
    "in_golden_set": "the prompt is in golden_data, which is never trained on",
}
# Reasons that are no fault of the row itself. Such rows do not count as bad; they have a limit of their own, or none.
NOT_BAD = ("exact_duplicate", "in_golden_set")
ROWS_PER_CHUNK = 1024  # tokenized at once; a fast tokenizer works on them in parallel
Split = Literal["train", "eval", "dropped"]


@dataclass(slots=True)
class Row:
    """One example as the steps of the data gate fill it in.

    Attributes:
        messages: The chat; empty where the row's structure is wrong.
        hash: 12 hex digits of the raw value's hash, to recognise a row without showing its text.
        reason: The code in `REASONS` of why the row was kept out; None for a good row.
        split: The split that the row belongs to; `dropped` is an evaluation row beyond `max_eval_rows`.
        language: The language that the data states, if it states one.
    """

    file: str
    number: int
    messages: list[chat.Message]
    hash: str
    tokens: int = 0
    supervised_tokens: int = 0
    reason: str | None = None
    split: Split | None = None
    language: str | None = None

    @property
    def location(self) -> str:
        """Return the file and the row number, for a message."""
        return f"{self.file}:{self.number}"


def check_row(raw: RawRow, config: DataConfig, special_texts: Sequence[str]) -> Row:
    """Return the row with its chat, or with the reason why it has none."""
    row = Row(raw.file, raw.number, [], _hash(raw.messages), language=raw.language)
    turns, row.reason = ([], raw.fault) if raw.fault else _parse_chat(raw.messages, special_texts)
    if row.reason:
        return row

    # Labels are compared as text, so " refund\n" and "refund" would be two labels.
    if config.task == "labels":
        turns[-1] = {"role": "assistant", "content": turns[-1]["content"].strip()}
    if config.system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system}, *turns]
    row.messages = turns
    return row


def measure_lengths(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill in the lengths in tokens; a row that is too long, or has no supervised token, gets its reason.

    Raises:
        UsageError: If the chat template cannot be used.
    """
    good_rows = [row for row in rows if not row.reason]
    for start in range(0, len(good_rows), ROWS_PER_CHUNK):
        chunk = good_rows[start : start + ROWS_PER_CHUNK]
        encoded = chat.encode_segments(tokenizer, [_segments(row, tokenizer) for row in chunk])

        for row, tokens in zip(chunk, encoded, strict=True):
            row.tokens, row.supervised_tokens = len(tokens.input_ids), tokens.supervised_tokens
            if row.tokens > config.max_length_tokens:
                row.reason = "too_long"
            elif not row.supervised_tokens:
                row.reason = "no_supervised_tokens"
        progress.update("measuring", start + len(chunk), len(good_rows))


def special_token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the tokens that are markup, e.g. the end of a turn; a row must not hold one as text."""
    # Some tokenizers list their markup only among the added tokens.
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens))


def explain_fault(row: Row, config: DataConfig) -> str:
    """Return one line that says where the row is, what is wrong with it and what was expected."""
    field = " and ".join(f'"{name}"' for name in required_fields(config))
    text = REASONS[row.reason or ""].format(field=field, limit=config.max_length_tokens)
    return f"{row.location}: {text}"


def _segments(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    try:
        return chat.segments(tokenizer, row.messages)
    except UsageError as error:
        raise UsageError(f"{row.location}: {error}") from error


def _hash(value: object) -> str:
    # default=str: Parquet files hold dates and decimals, which JSON does not have.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parse_chat(messages: object, special_texts: Sequence[str]) -> tuple[list[chat.Message], str | None]:
    """Return the turns and None, or no turns and the reason."""
    if not isinstance(messages, list):
        return [], "not_a_list"

    turns: list[chat.Message] = []
    for turn in messages:
        reason = _turn_fault(turn, special_texts)
        if reason:
            return [], reason
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns, _order_fault([turn["role"] for turn in turns])


def _turn_fault(turn: object, special_texts: Sequence[str]) -> str | None:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        return "not_a_turn"
    if turn["role"] not in chat.ROLES:
        return "unknown_role"
    # None counts as absent: Parquet writes it for a field that only other turns have.
    if any(value is not None for key, value in turn.items() if key not in ("role", "content")):
        return "extra_field"

    content = turn["content"]
    if not isinstance(content, str):
        return "bad_content_type"
    if not content.strip():
        return "empty_content"
    # JSON can escape half of a surrogate pair; UTF-8 cannot write one.
    if any("\ud800" <= character <= "\udfff" for character in content):
        return "bad_unicode"
    if any(special in content for special in special_texts):
        return "special_token"
    return None


def _order_fault(roles: list[str]) -> str | None:
    if "assistant" not in roles:
        return "no_assistant_turn"
    if roles[-1] != "assistant":
        return "no_final_answer"
    # With an odd number of turns the expected list is shorter, so they are never equal.
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    return None if turns == expected else "wrong_order"
