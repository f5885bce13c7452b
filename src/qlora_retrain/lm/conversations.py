"""Say which part of a chat is asked for, and when two chats are the same.

There are four notions of sameness, one for each use:

- one prompt, to the letter (`prompt_key`): what the model is given, for duplicates and contradictions;
- one prompt, by canonical text (`prompt_id`): which rows are no independent evidence, where the data gate does not say;
- one conversation, by canonical text (`conversation_path`): what must not be on both sides of a split;
- one row, to the letter (`row_id`): what scores and completions are looked up by.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_retrain.lm.content_spans import Chat, Message
from qlora_retrain.lm.rendering import Tools

# Quotes, apostrophes and dashes of typography, as a keyboard has them.
_PLAIN_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4\u02b9\u02bc\u2039\u203a", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
)
_FINAL_MARKS = " .!?,;:\u3002\u061f\u06d4\u0964"  # NFKC has made one form of the full-width ones


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
    """Return the text by which two texts count as equal on the sides of a split; coarser than any reader would notice.

    NFKC and case folded; without characters that have no shape; quotes and dashes of one form each; white space
    collapsed; without punctuation at the end. A text of punctuation alone stays.
    """
    # Quotes first, since NFKC makes a space and an accent of the acute one.
    text = (text if text.isascii() else unicodedata.normalize("NFKC", text.translate(_PLAIN_MARKS))).casefold()
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf" and not _is_selector(c))
    text = " ".join(text.split())
    return text.rstrip(_FINAL_MARKS) or text


def _is_selector(character: str) -> bool:
    """Return whether the character only selects the shape of the one before it."""
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def normalized_text(chat: Chat) -> str:
    """Return the canonical text of a chat, one line a turn.

    System turns are left out, so the same question under another instruction counts as the same question.
    """
    return "\n".join(_canonical_turn(turn) for turn in chat if turn["role"] != "system")


def conversation_path(chat: Chat) -> tuple[str, ...]:
    """Return the canonical turns that lead to the answer: first user turn, system turns, further turns in their order.

    A chat's path is a beginning of the path of each of its continuations. The first user turn comes before the system
    turns, so that the same question under another instruction has the same first element.
    """
    prompt = prompt_of(chat)
    # A system turn after an answer is no part of the beginning that ends with this answer.
    first_answer = next((i for i, turn in enumerate(prompt) if turn["role"] == "assistant"), len(prompt))
    early = [turn for turn in prompt[:first_answer] if turn["role"] == "system"]
    system = "system: " + " ".join(canonical_text(turn_text(turn)) for turn in early)
    turns = [turn for turn in prompt[:first_answer] if turn["role"] == "user"]
    turns += [turn for turn in prompt[first_answer:] if turn["role"] in ("user", "system")]

    first_user = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first_user is not None:
        question = turns.pop(first_user)
        return (_canonical_turn(question), system, *map(_canonical_turn, turns))

    # A text without a user turn is told apart by all that it says.
    text = normalized_text(chat[: len(prompt) + 1])
    return (system, text) if early else (text,)


def greeting_of(chat: Chat) -> Chat:
    """Return the turns before the first user turn where they hold an answer, as a chat of their own; else no turns."""
    first_user = next((i for i, turn in enumerate(chat) if turn["role"] == "user"), 0)
    greeting = chat[:first_user]
    is_learnt = any(turn["role"] == "assistant" and turn.get("weight", 1) != 0 for turn in greeting)
    return greeting if is_learnt else ()


def prompt_key(chat: Chat, tools: Tools = None) -> str:
    """Return 16 hex digits that are equal where the model is given the same, to the letter, before the answer."""
    unsupervised = [{key: value for key, value in turn.items() if key != "weight"} for turn in prompt_of(chat)]
    return _digest(unsupervised, tools)


def prompt_id(chat: Chat) -> str:
    """Return 16 hex digits that are equal where a chat asks the same, by canonical text.

    The data gate's rows state a coarser id, which a chat shares with its continuations (`prompt_id` of a row).
    """
    return hashlib.sha256("\n".join(conversation_path(chat)).encode()).hexdigest()[:16]


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
