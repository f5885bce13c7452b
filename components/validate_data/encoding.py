"""Render and tokenize the rows as training will, and give each row that the chat template cannot carry its reason."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from components.validate_data.checks import Row
from components.validate_data.readers.limits import count_characters
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.chat import ChatTokenizer, EncodedChat, Message, RowRefused
from qlora_retrain.lm.chat_format import ChatFormat

LoadedChat: TypeAlias = tuple[list[Message], list[dict[str, Any]] | None]
ROWS_PER_CHUNK = 1024  # tokenized at once; a fast tokenizer works on them in parallel
_CHUNK_CHARACTERS = 1 << 20
# The reasons that a template gives, and not the row alone.
TEMPLATE_REASONS = (
    "template_refuses",
    "template_drops_text",
    "template_rewrites_text",
    "answer_end_is_no_stop",
    "answer_has_no_end",
    "answer_inside_reasoning",
    "tools_unsupported",
)


def encode_rows(rows: Sequence[Row], config: DataConfig, tokenizer: ChatTokenizer, source: str) -> None:
    """Fill in the lengths in tokens; a row that is too long, or that the template cannot carry, gets its reason.

    Args:
        rows: Rows of one source; those with a reason are left as they are.
        config: The limits.
        tokenizer: The base model's, with the line's chat format.
        source: The source's name, for messages.

    Raises:
        UsageError: If the template can carry none of the rows, or `data.system` holds a mark of turns.
    """
    if config.marks_in_text == "refuse":
        _refuse_system_mark(config, tokenizer)

    open_rows = [row for row in rows if not row.reason]
    rendered: list[Row] = []
    num_done = 0
    for chunk in _chunks(open_rows):
        rendered += _encode_chunk(chunk, config, tokenizer)
        num_done += len(chunk)
        progress.update("measuring", num_done, len(open_rows))

    # One bad row is that row's fault. Where none can be rendered, the template or the data's layout is wrong.
    if rendered and all(row.reason in TEMPLATE_REASONS for row in rendered):
        first = rendered[0]
        raise UsageError(
            f"{source}: {first.location}: {first.detail} ({first.reason}); none of {len(rendered):,} rows "
            "can be rendered; choose another data.template, another base model, or another layout of the rows"
        )


def _chunks(rows: Sequence[Row]) -> Iterator[list[tuple[Row, LoadedChat]]]:
    """Yield the rows in parts, each with its chat; a tokenizer takes some hundred bytes of memory a character."""
    chunk, num_characters = list[tuple[Row, LoadedChat]](), 0
    for row in rows:
        chunk.append((row, row.chat_and_tools))
        num_characters += count_characters(chunk[-1][1][0], _CHUNK_CHARACTERS)
        if len(chunk) == ROWS_PER_CHUNK or num_characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _encode_chunk(chunk: Sequence[tuple[Row, LoadedChat]], config: DataConfig, tokenizer: ChatTokenizer) -> list[Row]:
    """Give each row its lengths or its reason, and return those that were rendered."""
    chats: list[tuple[Row, LoadedChat]] = []
    for row, (messages, tools) in chunk:
        if config.marks_in_text == "refuse" and (detail := _mark_in_chat(messages, tools, tokenizer)):
            row.reason, row.detail = "mark_in_text", detail
        # Every turn has a token, and the time of a chat grows with the square of its turns.
        elif len(messages) > config.max_length_tokens:
            row.reason, row.tokens = "too_long", len(messages)
        else:
            chats.append((row, (messages, tools)))

    encoded = tokenizer.encode_many([chat for _, chat in chats], config.max_length_tokens)
    for (row, _), examples in zip(chats, encoded, strict=True):
        if isinstance(examples, RowRefused):
            row.reason, row.detail, row.tokens = examples.reason, examples.detail, examples.num_tokens
            continue
        # An example is a sequence of its own, so the limit is on the longest.
        row.tokens = max((len(example.input_ids) for example in examples), default=0)
        row.supervised_tokens = sum(example.supervised_tokens for example in examples)
        row.examples = len(examples)
        row.prompt_key = _prompt_key(examples)
        row.warnings = tuple(dict.fromkeys(code for example in examples for code in example.warnings))
        if row.tokens > config.max_length_tokens:
            row.reason = "too_long"
        elif not row.supervised_tokens:
            row.reason, row.detail = "no_supervised_tokens", "each of its answers is empty or has the weight 0"
    return [row for row, _ in chats]


def _prompt_key(examples: Sequence[EncodedChat]) -> str:
    """Return a digest of the tokens before the last answer; two prompts that the template writes alike are one."""
    if not examples or True not in examples[-1].supervised:
        return ""
    supervised = examples[-1].supervised
    end = len(supervised) - 1 - supervised[::-1].index(True)
    while end and supervised[end - 1]:
        end -= 1
    ids = array("q", examples[-1].input_ids[:end])
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]


def dataset_chat_format(chat_format: ChatFormat, rows: Sequence[Row]) -> ChatFormat:
    """Return the format that consumers need: it also says where the answers of these rows begin."""
    training = [row for row in rows if row.split == "train"]
    from_history = sum("answer_start_from_history" in row.warnings for row in training)
    return replace(chat_format, answer_start="history" if 2 * from_history > len(training) else "generation_prompt")


def _refuse_system_mark(config: DataConfig, tokenizer: ChatTokenizer) -> None:
    if config.system is not None and (mark := tokenizer.find_mark(config.system, "system")):
        raise UsageError(
            f"data.system: it holds {mark!r}, with which the chat template begins or ends a turn; write it in other "
            "words, or set data.marks_in_text: allow"
        )


def _mark_in_chat(messages: list[Message], tools: list[dict[str, Any]] | None, tokenizer: ChatTokenizer) -> str | None:
    """Return where a text would forge a turn: in a turn, the arguments of a call or the description of a tool."""
    for i, turn in enumerate(messages):
        for text in _texts({key: value for key, value in turn.items() if key != "role"}):
            if mark := tokenizer.find_mark(text, turn["role"]):
                return f"turn {i + 1} ({turn['role']}) holds {mark!r}"
    for text in _texts(list(tools or ())):
        if mark := tokenizer.find_mark(text, "assistant"):
            return f"its tools hold {mark!r}"
    return None


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
