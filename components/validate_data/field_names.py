"""The names and the shapes by which a file's fields are recognised, and the messages where none is.

`Columns` is what the first records of a file hold: each field's name, with its values that are not empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from components.validate_data.turns import CALL_KEYS, TurnParser, is_exchange, turn_keys
from components.validate_data.values import (
    RowFault,
    folded,
    is_empty,
    leaf_paths,
    parsed,
    value_at,
    without_nan,
)

Columns = dict[str, list[object]]
# Names are compared without letter case and punctuation, so these stand for `user_input` and `UserInput` too.
CHATS = "messages conversations conversation dialogue dialog chat turns contents chats dialogs data".split()
PROMPTS = (
    "instruction instructions instruct prompt question query problem userinput usermessage userprompt questiontext"
).split()
# Prompts where a file has none of the names above; with one, the first two are a further part of the prompt.
OTHER_PROMPTS = "input context inputs inputtext human user q".split()
FURTHER_PARTS = ("input", "context")
RESPONSES = (
    "output outputs response completion answer assistant target targets targettext outputtext answertext reply bot gpt "
    "assistantresponse modelresponse solution a"
).split()
# Columns that belong to a prompt more often than not, so that none of them is left out unasked.
PROMPT_PARTS = (
    "choices options candidates passage passages paragraph document documents article schema dbschema tableschema ddl "
    "createtable table tables premise hypothesis evidence background story knowledge facts persona sqlcontext input "
    "context"
).split()
# With a number or a letter behind, e.g. `option1` and `choice_a`.
NUMBERED_PARTS = frozenset("option choice candidate passage document context evidence paragraph article ending".split())
_CHOICES = ("_options", "_choices", "_candidates")  # e.g. question_options
_NUMBERED = re.compile(r"(.+?)(?:[_\- ]?\d{1,2}|[_\- ][A-Ea-e]|(?<=[a-z])[A-E])")
LABEL_PROMPTS = "text sentence utterance review tweet content title document message".split()
LABELS = "label labels labeltext labelname category intent class sentiment emotion polarity topic".split()
TEXTS = "text content document body story page article".split()
SYSTEMS = "system systemprompt systemmessage systeminstruction".split()
TOOLS = ("tools", "functions", "toolConfig", "tool_config")
HISTORY = "history"
# As servers name it; other names, such as `explanation`, may be about the row and not before its answer.
REASONING = "reasoningcontent"


def stem(name: str) -> str | None:
    """Return a name without its number or its letter, as it is compared: `option` of `option1`; None without one."""
    match = _NUMBERED.fullmatch(name)
    return folded(match[1]) if match else None


def is_prompt_part(name: str) -> bool:
    """Return whether a column's name says that it belongs to a prompt."""
    is_list_of_choices = name.casefold().endswith(_CHOICES)
    return folded(name) in PROMPT_PARTS or stem(name) in NUMBERED_PARTS or is_list_of_choices


def columns_of(samples: Iterable[Mapping[str, object]]) -> Columns:
    """Return the values of each field that are not empty, in the order of the fields."""
    columns: Columns = {}
    for fields in samples:
        for name, value in fields.items():
            values = columns.setdefault(str(name), [])
            if not is_empty(without_nan(value)):
                values.append(value)
    return columns


def named(columns: Columns, names: Sequence[str]) -> list[str]:
    """Return the filled fields that have one of the names, in the order of the names."""
    ranks = {name: i for i, name in enumerate(names)}
    fields = [field for field, values in columns.items() if values and folded(field) in ranks]
    return sorted(fields, key=lambda field: ranks[folded(field)])


def values_of(columns: Columns, path: str) -> list[object]:
    """Return the values at a path that are not empty; none where no field has the path."""
    if path in columns:
        return columns[path]
    # The field's own name may have a dot.
    head = next((name for name in columns if path.startswith(f"{name}.")), None)
    values = (value_at({head: value}, path) for value in columns[head]) if head else ()
    return [value for value in values if not is_empty(value)]


def holds_text(values: Sequence[object]) -> bool:
    """Return whether a field's values are texts."""
    return bool(values) and sum(isinstance(value, str) for value in values) * 2 > len(values)


def chat_paths(columns: Columns, parser: TurnParser) -> list[str]:
    """Return the paths of the fields whose values are chats; an object may hold one in a field of its own."""
    paths = []
    for name, values in columns.items():
        candidates = {name: values}
        if all(isinstance(value, Mapping) for value in values):
            for value in values:
                for path, item in leaf_paths({name: value}):
                    candidates.setdefault(path, []).append(item)
        paths += [path for path, items in candidates.items() if _are_chats(path, items, parser)]
    return paths


def end_with_answers(values: Sequence[object], parser: TurnParser) -> bool:
    """Return whether most of the chats end with an assistant's turn; without one the answer is in another field."""
    flags = [_ends_with_answer(value, parser) for value in values]
    return sum(flags) * 2 > len(flags)


def is_turns(value: object, parser: TurnParser) -> bool:
    """Return whether the value is a list of turns, each with a role that is recognised, or their JSON text."""
    value = parsed(value)
    return isinstance(value, list) and bool(value) and all(is_turn(item, parser) for item in value)


def has_role(value: object) -> bool:
    """Return whether the value is an object with the name of a role, recognised or not."""
    return isinstance(value, Mapping) and turn_keys(value)[0] is not None


def is_turn(value: object, parser: TurnParser) -> bool:
    """Return whether the value is an object with a recognised role and a content."""
    if not isinstance(value, Mapping):
        return False
    role, content = turn_keys(value)
    has_content = content is not None or any(value.get(key) is not None for key in CALL_KEYS)
    return role is not None and has_content and parser.has_role(value[role])


def are_json_turns(values: Sequence[object], parser: TurnParser) -> bool:
    """Return whether all values are the JSON text of a chat without its last answer; each turn has some role."""
    chats = [parsed(value) for value in values if isinstance(value, str)]
    turns = [chat for chat in chats if isinstance(chat, list) and chat and all(map(has_role, chat))]
    # A role that is not recognised is for the row's own message.
    is_chat = any(is_turn(turn, parser) for chat in turns for turn in chat)
    return is_chat and len(turns) == len(values) and not any(_is_answer(chat[-1], parser) for chat in turns)


def _is_answer(turn: object, parser: TurnParser) -> bool:
    return is_turn(turn, parser) and parser.parse([turn])[0][-1]["role"] == "assistant"


def _are_chats(path: str, values: Sequence[object], parser: TurnParser) -> bool:
    is_named = folded(path.rpartition(".")[2]) in CHATS
    flags = [_is_chat(value, is_named, parser) for value in values if not is_empty(value)]
    return bool(flags) and sum(flags) * 5 >= len(flags) * 4


def _is_chat(value: object, is_named: bool, parser: TurnParser) -> bool:
    """Return whether a value is a chat; a field that is named as one may have unknown roles, or texts in turn."""
    value = parsed(value)
    if isinstance(value, str):
        return False
    try:
        turns = parser.turns_of(value)
    except RowFault:
        return False
    if not turns or not all(isinstance(turn, Mapping) for turn in turns):
        return False
    # Texts in turn, and pairs of texts, are a chat by the field's name alone.
    if turns is not value and isinstance(value, list):
        return is_named
    is_turn_like = [isinstance(t, Mapping) and (is_exchange(t) or turn_keys(t)[0] is not None) for t in turns]
    return all(is_turn_like) and (is_named or any(is_turn(t, parser) for t in turns))


def _ends_with_answer(value: object, parser: TurnParser) -> bool:
    try:
        messages = parser.parse(parsed(value))[0]
        return bool(messages) and messages[-1]["role"] == "assistant"
    except RowFault:
        # The row's own message will say more.
        return True
