"""Bring the turns of a foreign chat into this project's form: `{"role", "content", ...}`.

Read: OpenAI's turns, ShareGPT's (`from`, `value`) and others with their own keys and roles, exchanges of a prompt and
an answer (`[[q, a], ...]`, `{"input", "output"}`), texts in turn, and any of them as JSON text. Calls and tools are
read by `calls`, contents by `content`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from components.validate_data.calls import Tool, parse_calls, parse_tools
from components.validate_data.content import parse_content
from components.validate_data.roles import ROLES, describe_unknown, role_name, unknown_role_words
from components.validate_data.tool_parts import split_content
from components.validate_data.values import RowFault, describe_type, folded, is_empty, parse_json, shorten, text_of

Message = dict[str, Any]
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "transcript", "parts")
# An object without a role may be an exchange: each of its keys says whose text it holds.
EXCHANGE_KEYS = {
    "system": "system",
    **dict.fromkeys(("user", "human", "input", "prompt", "question", "query", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "output", "answer", "response", "completion"), "assistant"),
}
# LangChain has the role under `type`, where elsewhere the kind of an object is.
LANGCHAIN_ROLES = ("human", "ai", "system", "tool")
BRANCH_KEYS = ("replies", "children")  # as OpenAssistant's trees of messages have
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "train", "training", "trainable", "loss", "train_on_turn", "output_with_loss")
CALL_KEYS = ("tool_calls", "function_call")
TOOLS_KEYS = ("tools", "functions")
# Keys that say something about a turn and nothing to the model, however long their values are; compared as field
# names are, so that these stand for `_id` and `createdAt` too.
METADATA = frozenset(
    "id uuid messageid parentid timestamp ts time date created createdat updatedat index turn turnid model source "
    "metadata meta annotations refusal logprobs audio html markdown responsemetadata usagemetadata usage frames "
    "dialogact dialogacts dialogueact dialogueacts".split()
)
# Of any other key; more text than this may be something that the model should read.
MAX_METADATA_CHARACTERS, MAX_METADATA_WORDS = 40, 3


class TurnParser:
    """Parse chats by the settings of one line.

    Attributes:
        ignored_keys: The keys of turns that nothing read, with the number of turns that have each.
    """

    def __init__(self, roles: Mapping[str, str], ignore_fields: Iterable[str]) -> None:
        self._roles = ROLES | {role_name(name): role for name, role in roles.items()}
        self._ignore_fields = frozenset(ignore_fields)
        self.ignored_keys: Counter[str] = Counter()

    def parse(self, value: object) -> tuple[list[Message], list[Tool] | None]:
        """Return the turns, and the tools that system turns list; an empty system turn falls away.

        Raises:
            RowFault: For a turn that cannot be read; the detail has its number.
        """
        messages: list[Message] = []
        tools: list[Tool] = []
        turns = self.turns_of(value)
        for number, turn in enumerate(turns, 1):
            try:
                messages += self._parse_turn(turn, tools)
            except RowFault as fault:
                raise RowFault(fault.reason, f"turn {number}: {self._explain(fault, turns)}") from None
        return [m for m in messages if m["role"] != "system" or m["content"].strip()], tools or None

    def turns_of(self, value: object) -> Sequence[object]:
        """Return the items of a chat, each an object with a role, or an exchange.

        Raises:
            RowFault: If the value is no list, nor another form of one.
        """
        if isinstance(value, str):
            text = value
            try:
                value = parse_json(text)
            except ValueError:
                raise RowFault("bad_json", _explain_text(text)) from None

        # Objects of lists: HF's `Sequence` feature writes a list of objects so.
        if isinstance(value, Mapping) and None not in turn_keys(value) and _are_columns(list(value.values())):
            return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        if not isinstance(value, list | tuple):
            raise RowFault("not_a_list", describe_type(value))

        if len(value) > 1 and all(isinstance(item, str) for item in value):
            return [{"role": "assistant" if i % 2 else "user", "content": item} for i, item in enumerate(value)]
        if value and all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
            # A pair is a role with its text, or a prompt with its answer.
            if all(self.has_role(first) for first, _ in value) or _are_names([first for first, _ in value]):
                return [{"role": first, "content": second} for first, second in value]
            return [{"user": first, "assistant": second} for first, second in value]
        if any(_is_wrapped(item) for item in value):
            return [{**item["data"], "type": item["type"]} if _is_wrapped(item) else item for item in value]
        return value

    def has_role(self, name: object) -> bool:
        """Return whether the name of the role is recognised."""
        return isinstance(name, str) and role_name(name) in self._roles

    def _parse_turn(self, turn: object, tools: list[Tool]) -> list[Message]:
        if not isinstance(turn, Mapping):
            raise RowFault("not_a_turn", describe_type(turn))
        if is_exchange(turn):
            return self._parse_exchange(turn)

        role_key, content_key = turn_keys(turn)
        has_calls = any(not is_empty(turn.get(key)) for key in CALL_KEYS)
        if role_key is None or (content_key is None and not has_calls and "content" not in turn):
            keys = ", ".join(shorten(key) for key in list(turn)[:8])
            raise RowFault("not_a_turn", f"its keys are: {keys}")

        role, content = self._role(turn[role_key]), turn.get(content_key) if content_key else None
        message: Message = {"role": role, "content": ""}
        reasoning, calls, results = "", list[Tool](), list[Message]()
        if split := split_content(content):
            content, calls, results = split.content, split.calls, split.results
            if (calls and role != "assistant") or (results and role not in ("user", "tool")):
                raise RowFault("bad_content_type", f"a call or a result in a turn of the {role}")
            # The results alone are turns of their own.
            if not content and not calls:
                self._with_extras({"role": "user", "content": ""}, turn, {role_key, content_key}, [], "")
                return results
            if content:
                message["content"], reasoning = parse_content(content)
        elif role == "call":
            message["role"], calls = "assistant", parse_calls(content)
        elif content is not None or not (has_calls or role == "tool"):
            message["content"], reasoning = parse_content(content)
        if role == "system":
            tools += [tool for key in TOOLS_KEYS for tool in parse_tools(turn.get(key), key) or ()]
        read_keys = {role_key, content_key, *(TOOLS_KEYS if role == "system" else ())}
        if any(key in turn and self._is_branch(turn[key]) for key in BRANCH_KEYS):
            raise RowFault("branching_chat", "its turns hold the turns that follow them")
        return [*results, self._with_extras(message, turn, read_keys, calls, reasoning)]

    def _parse_exchange(self, turn: Mapping[str, object]) -> list[Message]:
        """Return the turns of an object such as `{"input": ..., "output": ...}`."""
        messages = []
        for role in ("system", "user", "assistant"):
            keys = [key for key, value in turn.items() if EXCHANGE_KEYS.get(key) == role and not is_empty(value)]
            if len(keys) > 1 and keys != ["instruction", "input"]:
                raise RowFault("extra_field", f"both {shorten(keys[0])} and {shorten(keys[1])} for the role {role}")
            if not keys:
                continue

            content, reasoning = "\n\n".join(parse_content(turn[key])[0] for key in keys), ""
            if role == "assistant":
                content, reasoning = parse_content(turn[keys[0]])
            # The other keys are looked at once, with the answer.
            read_keys = set(EXCHANGE_KEYS) if role == "assistant" else set(turn)
            messages.append(self._with_extras({"role": role, "content": content}, turn, read_keys, [], reasoning))
        return messages

    def _role(self, name: object) -> str:
        if words := unknown_role_words(name):
            raise RowFault("unknown_role", words)
        role = self._roles.get(role_name(str(name)))
        if role is None:
            raise RowFault("unknown_role")
        return role

    def _is_branch(self, value: object) -> bool:
        return isinstance(value, list) and any(isinstance(item, Mapping) and turn_keys(item)[0] for item in value)

    def _explain(self, fault: RowFault, turns: Sequence[object]) -> str:
        """Return the fault's detail; all roles and keys of the chat that need one setting are named at once."""
        items = [turn for turn in turns if isinstance(turn, Mapping)]
        if fault.reason == "unknown_role" and not fault.detail:
            return describe_unknown([turn[key] for turn in items if (key := turn_keys(turn)[0])], self._roles)
        return fault.detail

    def _with_extras(
        self, message: Message, turn: Mapping[str, object], read_keys: set[Any], calls: list[Tool], reasoning: str
    ) -> Message:
        """Return the message with what the turn has besides its content; refuse a text that nothing would read."""
        read_keys |= {"name", "tool_call_id"}
        is_assistant = message["role"] == "assistant"
        if is_assistant:
            read_keys |= {*REASONING_KEYS, *CALL_KEYS}
            texts = [reasoning] if reasoning else []
            texts += [text_of(turn[key]) for key in REASONING_KEYS if not is_empty(turn.get(key))]
            if len(set(texts)) > 1:
                raise RowFault("extra_field", "two different texts of reasoning")
            reasoning = texts[0] if texts else ""
            calls = calls or next((parse_calls(turn[k]) for k in CALL_KEYS if not is_empty(turn.get(k))), [])
            message |= {"reasoning_content": reasoning} if reasoning else {}
            message |= {"tool_calls": calls} if calls else {}

        for key in ("name", "tool_call_id"):
            message |= {} if is_empty(turn.get(key)) else {key: text_of(turn[key])}
        if is_assistant and not _is_supervised(turn, read_keys):
            message["weight"] = 0
        # A key that repeats the content loses nothing.
        others = {key: value for key, value in turn.items() if key not in read_keys and value != message["content"]}
        self._check_other_keys(others)
        return message

    def _check_other_keys(self, values: Mapping[str, object]) -> None:
        unread: list[str] = []
        for key, value in values.items():
            if is_empty(value):
                continue
            is_short = not isinstance(value, str | list | Mapping) or (
                isinstance(value, str)
                and len(value) <= MAX_METADATA_CHARACTERS
                and len(value.split()) <= MAX_METADATA_WORDS
                and key not in (*CALL_KEYS, *REASONING_KEYS)
            )
            if not is_short and folded(key) not in METADATA and key not in self._ignore_fields:
                unread.append(key)
            self.ignored_keys[shorten(key)] += 1
        if unread:
            keys = " and ".join(f'"{shorten(key)}" ({describe_type(values[key])})' for key in unread)
            setting = f"data.ignore_fields: [{', '.join(map(shorten, unread))}]"
            raise RowFault("extra_field", f"the key {keys}; to lose its text, set {setting}")


def turn_keys(turn: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return the keys of the role and of the content; None where there is none."""
    role = next((key for key in ROLE_KEYS if turn.get(key) is not None), None)
    if role is None and turn.get("type") in LANGCHAIN_ROLES:
        role = "type"
    content = next((key for key in CONTENT_KEYS if key != role and turn.get(key) is not None), None)
    return role, content


def _are_columns(values: list[object]) -> bool:
    lengths = {len(value) for value in values if isinstance(value, list)}
    return len(lengths) == 1 and all(isinstance(value, list) for value in values)


def _are_names(values: Sequence[object]) -> bool:
    """Return whether the values are the names of speakers: words that come again, or that are written in capitals."""
    words = [value for value in values if isinstance(value, str) and re.fullmatch(r"\w{2,20}", value)]
    come_again = len(words) > 2 and len(set(words)) * 2 <= len(words)
    return len(words) == len(values) and (come_again or all(map(str.isupper, words)))


def _explain_text(text: str) -> str:
    # As NumPy prints arrays of objects: without commas between them.
    if re.match(r"\s*(\[\s*\{|\[?\s*array\()", text) and re.search(r"\}\s*\n\s*\{|dtype=object", text):
        return "it is a NumPy array as it is printed; write the column with json.dumps, or the file as Parquet"
    return "where turns are one text, set data.text_field and data.answer_after"


def _is_wrapped(turn: object) -> bool:
    """Return whether LangChain has put the turn's content into an object: `{"type": "human", "data": {...}}`."""
    return isinstance(turn, Mapping) and turn.get("type") in LANGCHAIN_ROLES and isinstance(turn.get("data"), Mapping)


def is_exchange(turn: Mapping[str, object]) -> bool:
    """Return whether the object has no role, and a prompt or an answer under a key that names its speaker."""
    return turn_keys(turn)[0] is None and any(
        EXCHANGE_KEYS.get(key) in ("user", "assistant") and not is_empty(value) for key, value in turn.items()
    )


def _is_supervised(turn: Mapping[str, object], read_keys: set[Any]) -> bool:
    """Return whether the assistant's turn is to be learnt; the keys that say so are added to `read_keys`."""
    is_supervised = True
    for key in WEIGHT_KEYS:
        value = turn.get(key)
        # Anything else than 0 and 1 under another name than OpenAI's is a key like others.
        if value is None or (key != "weight" and value not in (0, 1)):
            continue
        if value not in (0, 1):
            raise RowFault("bad_weight", f'{describe_type(value)} in "{key}"')
        read_keys.add(key)
        is_supervised &= bool(value)
    return is_supervised
