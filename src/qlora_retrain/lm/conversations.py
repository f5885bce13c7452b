"""Say which part of a chat is asked for, and when two chats are the same.

There are three notions of sameness, one for each use:

- one prompt, to the letter (`prompt_key`): what the model is given, for duplicates and contradictions;
- one conversation, by canonical text (`conversation_path`): what must not be on both sides of a split;
- one row, to the letter (`row_id`): what scores and completions are looked up by.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.lm.rendering import Chat, Message, Tools


def prompt_of(chat: Chat) -> list[Message]:
    """Return everything before the answer: the last assistant turn that is supervised."""
    # Turns after the last answer are left out too, since no answer follows them.
    return list(chat[: _answer_index(chat)])


def answer_turn(chat: Chat) -> Message | None:
    """Return the answer: the last assistant turn that is supervised; None where there is no assistant turn."""
    index = _answer_index(chat)
    return chat[index] if index < len(chat) else None


def answer_of(chat: Chat) -> str:
    """Return the answer as text: its content, and below it one line of canonical JSON for each call."""
    turn = answer_turn(chat)
    return "" if turn is None else turn_text(turn)


def turn_text(turn: Mapping[str, Any]) -> str:
    """Return what a turn says and calls, as text: its content, and one line of canonical JSON for each call."""
    calls = [canonical_call(call) for call in turn.get("tool_calls") or ()]
    content = turn.get("content") or ""
    return "\n".join([content, *calls] if content else calls)


def canonical_call(call: Mapping[str, Any]) -> str:
    """Return a tool call as JSON that is equal for equal calls: sorted keys, without the call's id."""
    function = call.get("function", call)
    record = {"name": function.get("name"), "arguments": function.get("arguments")}
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def canonical_text(text: str) -> str:
    """Return the text by which two texts count as equal: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalized_text(chat: Chat) -> str:
    """Return the canonical text of a chat, one line a turn.

    System turns are left out, so the same question under another instruction counts as the same question.
    """
    return "\n".join(_canonical_turn(turn) for turn in chat if turn["role"] != "system")


def conversation_path(chat: Chat) -> tuple[str, ...]:
    """Return the canonical turns that lead to the answer: first user turn, system turns, further user turns.

    A chat's path is a beginning of the path of each of its continuations. The first user turn comes before the system
    turn, so that the same question under another instruction has the same first element.
    """
    prompt = prompt_of(chat)
    questions = [_canonical_turn(turn) for turn in prompt if turn["role"] == "user"]
    system = "system: " + " ".join(canonical_text(turn_text(turn)) for turn in prompt if turn["role"] == "system")
    if questions:
        return (questions[0], system, *questions[1:])

    # A text without a user turn is told apart by all that it says.
    has_system = any(turn["role"] == "system" for turn in prompt)
    return (system, normalized_text(chat)) if has_system else (normalized_text(chat),)


def prompt_key(chat: Chat, tools: Tools = None) -> str:
    """Return 16 hex digits that are equal where the model is given the same, to the letter, before the answer."""
    unsupervised = [{key: value for key, value in turn.items() if key != "weight"} for turn in prompt_of(chat)]
    return _digest(unsupervised, tools)


def row_id(chat: Chat, tools: Tools = None) -> str:
    """Return 16 hex digits that name a row: its turns and its tools, to the letter; the same in every data set."""
    return _digest(chat, tools)


def _answer_index(chat: Chat) -> int:
    turns = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
    supervised = [i for i in turns if chat[i].get("weight", 1) != 0]
    return (supervised or turns or [len(chat)])[-1]


def _canonical_turn(turn: Message) -> str:
    return f"{turn['role']}: {canonical_text(turn_text(turn))}"


def _digest(chat: Sequence[Mapping[str, Any]], tools: Tools) -> str:
    # Only the order of a turn's own fields has no meaning; templates write arguments and tools in the order they have.
    turns = [dict(sorted(turn.items())) for turn in chat]
    text = json.dumps([turns, list(tools) if tools else None])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
