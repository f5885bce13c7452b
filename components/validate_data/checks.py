"""Raw rows to chats of one schema, with their lengths in tokens; what is wrong with a row is a reason code.

A chat is a list of `{"role": system|user|assistant, "content": text}`: at most one system turn, first; then user and
assistant in turn; the assistant last. Rows are quarantined, never repaired and never truncated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from components.validate_data.reading import RawRow, wanted_fields
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What each reason says to a person; {field} and {limit} are filled in.
REASONS = {
    "missing_field": "{field} has no value",
    "not_an_object": "the line is JSON but not an object with fields; wanted {field} in an object",
    "ragged_row": "the row has more or fewer fields than the header; quote fields that hold commas or line breaks",
    "bad_json": "{field} holds text that is not JSON; wanted a list of turns",
    "not_a_list": "{field} is not a list of turns",
    "not_a_turn": "{field} holds a turn that is not an object with a role and a content",
    "extra_field": "{field} holds a turn with fields beside role and content, which would be lost",
    "unknown_role": "{field} holds a role other than system, user and assistant",
    "bad_content_type": "{field} holds a content that is not text",
    "empty_content": "{field} holds a turn without text",
    "bad_unicode": "{field} holds half of a surrogate pair, which no encoding can write",
    "special_token": "{field} holds one of the tokenizer's special tokens as text, which could forge a turn",
    "no_assistant_turn": "{field} has no assistant turn; a conversation needs a user turn and an assistant turn",
    "no_final_answer": "{field} does not end with an assistant turn",
    "wrong_order": "{field} has its turns out of order; wanted system (or none), then user and assistant in turn",
    "too_long": "the chat is longer than data.max_length_tokens = {limit}; rows are never truncated",
    "no_supervised_tokens": "the chat template leaves no token of the answer to learn",
    "conflicting_answer": "another row gives this prompt another label, so neither can be trusted",
    "exact_duplicate": "an earlier row has the same prompt and the same answer",
    "in_golden_set": "the prompt is in golden_data, which is never trained on",
}
NOT_BAD = ("exact_duplicate", "in_golden_set")  # counted apart from the bad rows
CHUNK = 1024  # rows tokenized at once
Split = Literal["train", "eval", "dropped"]


@dataclass(slots=True)
class Row:
    """One example on its way through the gate.

    Attributes:
        messages: The chat; empty where the row's structure is wrong.
        hash: 12 hex of what was found, to recognise a row without showing it.
        reason: Why it was quarantined.
        split: Where it went; `dropped` is evaluation beyond `max_eval_rows`.
        language: What the data says of it, if it does.
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
    def place(self) -> str:
        """Where a person finds the row."""
        return f"{self.file}:{self.number}"


def check(raw: RawRow, config: DataConfig, specials: Sequence[str]) -> Row:
    """The row with its chat, or with the reason why there is none."""
    row = Row(raw.file, raw.number, [], _hash(raw.messages), language=raw.language)
    turns, row.reason = ([], raw.fault) if raw.fault else _chat_of(raw.messages, specials)
    if row.reason:
        return row
    if config.task == "labels":
        turns[-1] = {"role": "assistant", "content": turns[-1]["content"].strip()}
    if config.system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system}, *turns]
    row.messages = turns
    return row


def measure(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill in the lengths in tokens; what is too long, or leaves nothing to learn, gets its reason.

    Raises:
        UsageError: If the chat template cannot be used.
    """
    good = [row for row in rows if not row.reason]
    for start in range(0, len(good), CHUNK):
        chunk = good[start : start + CHUNK]
        encoded = chat.encode_pieces(tokenizer, [_pieces(row, tokenizer) for row in chunk])
        for row, found in zip(chunk, encoded, strict=True):
            row.tokens, row.supervised_tokens = len(found.input_ids), found.supervised_tokens
            if row.tokens > config.max_length_tokens:
                row.reason = "too_long"
            elif not row.supervised_tokens:
                row.reason = "no_supervised_tokens"
        progress.update("measuring", start + len(chunk), len(good))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that a text could only hold to be mistaken for markup, e.g. the end of a turn."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens))


def explain(row: Row, config: DataConfig) -> str:
    """One line that says where the row is, what is wrong with it and what was wanted."""
    field = " and ".join(f'"{name}"' for name in wanted_fields(config))
    text = REASONS[row.reason or ""].format(field=field, limit=config.max_length_tokens)
    return f"{row.place}: {text}"


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    try:
        return chat.pieces(tokenizer, row.messages)
    except UsageError as error:
        raise UsageError(f"{row.place}: {error}") from error


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chat_of(messages: object, specials: Sequence[str]) -> tuple[list[chat.Message], str | None]:
    if not isinstance(messages, list):
        return [], "not_a_list"
    turns: list[chat.Message] = []
    for turn in messages:
        reason = _turn_fault(turn, specials)
        if reason:
            return [], reason
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns, _order_fault([turn["role"] for turn in turns])


def _turn_fault(turn: object, specials: Sequence[str]) -> str | None:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        return "not_a_turn"
    if turn["role"] not in chat.ROLES:
        return "unknown_role"
    if any(value is not None for key, value in turn.items() if key not in ("role", "content")):
        return "extra_field"  # Parquet writes None for a field that only other turns have
    content = turn["content"]
    if not isinstance(content, str):
        return "bad_content_type"
    if not content.strip():
        return "empty_content"
    if any("\ud800" <= character <= "\udfff" for character in content):
        return "bad_unicode"
    if any(special in content for special in specials):
        return "special_token"
    return None


def _order_fault(roles: list[str]) -> str | None:
    if "assistant" not in roles:
        return "no_assistant_turn"
    if roles[-1] != "assistant":
        return "no_final_answer"
    turns = roles[1:] if roles[0] == "system" else roles
    wanted = ["user", "assistant"] * (len(turns) // 2)
    return None if turns == wanted else "wrong_order"
