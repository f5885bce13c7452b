"""Recognise rows that no setting can read, since a row is not one example: what they are, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from components.validate_data.content import MEDIA_FIELDS, is_medium
from components.validate_data.field_names import LABELS, PROMPTS, RESPONSES, Columns
from components.validate_data.turns import CONTENT_KEYS
from components.validate_data.values import folded, parsed, shorten

# Files with a row for each turn: who speaks, when, and to what it belongs.
_SPEAKERS = frozenset("role from speaker sender user userid fromid".split())
_WRITERS = _SPEAKERS | frozenset("author authorid username".split())
_TIMES = frozenset("ts timestamp createdat time".split())
_THREADS = frozenset(
    "threadts threadid parentid conversationid inresponsetotweetid inreplyto replyto dialogueid dialogid "
    "sessionid".split()
)
_ANSWERS = frozenset((*RESPONSES, *LABELS, "answers"))
_PROMPT_LISTS = ("questions", "queries", "instructions", "prompts", "patterns", "utterances")
_MAX_DEPTH = 6


def explain_shape(columns: Columns) -> str | None:
    """Return what the rows are and what to write instead; None where a row may be an example."""
    if medium := next((name for name, values in columns.items() if _are_media(name, values)), None):
        return f"each row goes with a medium ({shorten(medium)}), and only text can be learnt"
    if answer := _empty_answer(columns):
        return f"{shorten(answer)} is empty in every row, so nothing is to be learnt"
    if calls := next((name for name, values in columns.items() if any(map(_has_call_as_text, values))), None):
        return (
            f"{shorten(calls)} holds calls as text (<functioncall>), in turns that are one text; write each turn as an "
            "item of a list in a field messages, a call as tool_calls, and the functions in a field tools"
        )
    if parts := next((name for name, values in columns.items() if values and all(map(_are_segments, values))), None):
        return f"{shorten(parts)} holds parts of rendered texts; write the turns as a list in a field messages"
    if "inputids" in map(folded, columns):
        return "the rows are tokens, of one tokenizer; bring the texts that they were made of"
    if _is_one_turn(columns):
        return "each row is one turn; put the turns of a chat into one row, as a list in a field messages"
    if tree := next((name for name, values in columns.items() if _are_trees(values)), None):
        return f"{shorten(tree)} is a tree of turns; write each path through it as a list in a field messages"
    if path := _rows_within(columns):
        return f"each row holds a list of rows in {shorten(path)}; write each item of it as a row of its own"
    return None


def nodes(path: str, value: object, depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the value and what is in it, by their paths; of a list the first item alone."""
    yield path, value
    if depth == _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from nodes(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, list) and value:
        yield from nodes(f"{path}.0", value[0], depth + 1)


def _has_call_as_text(value: object) -> bool:
    return isinstance(value, str) and "<functioncall>" in value


def _are_segments(value: object) -> bool:
    """Return whether a value is a list of texts that each say whether they are learnt, as axolotl reads them."""
    items = value if isinstance(value, list) else []
    return bool(items) and all(
        isinstance(item, Mapping) and item.keys() == {"label", "text"} and isinstance(item["label"], bool)
        for item in items
    )


def _are_media(name: str, values: Sequence[object]) -> bool:
    return name in MEDIA_FIELDS and sum(map(is_medium, values)) * 2 > len(values)


def _empty_answer(columns: Columns) -> str | None:
    """Return the answer's field where no row fills it, nor another field that is named as one."""
    answers = [name for name in columns if folded(name) in _ANSWERS]
    return answers[0] if answers and not any(columns[name] for name in answers) else None


def _are_trees(values: Sequence[object]) -> bool:
    """Return whether the values are objects of nodes that name those that follow them, as ChatGPT exports chats."""
    return bool(values) and all(
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(node, Mapping) and {"parent", "children"} <= node.keys() for node in value.values())
        for value in values
    )


def _rows_within(columns: Columns) -> str | None:
    """Return the path of a list whose items are rows: a question with its answer each."""
    for name, values in columns.items():
        if folded(name) in _PROMPT_LISTS and _are_several(values):
            return name
        lists: Columns = {}
        for value in values:
            for path, item in nodes(name, parsed(value)):
                if isinstance(item, list) and item and isinstance(item[0], Mapping):
                    lists.setdefault(path, []).append(item)
        for path, items in lists.items():
            keys = {folded(str(key)) for item in items if isinstance(item, list) for key in item[0]}
            if _are_several(items) and keys & set(PROMPTS) and keys & _ANSWERS:
                return path
    return None


def _are_several(values: Sequence[object]) -> bool:
    return sum(isinstance(value, list) and len(value) > 1 for value in values) * 2 > len(values)


def _is_one_turn(columns: Columns) -> bool:
    fields = {folded(name) for name, values in columns.items() if values}
    has_link = bool(fields & _THREADS and fields & _WRITERS) or bool(fields & _TIMES and fields & _SPEAKERS)
    is_turn = bool(fields & {"role", "from", "speaker"}) or has_link
    return is_turn and bool(fields & set(CONTENT_KEYS)) and not fields & set(RESPONSES)
