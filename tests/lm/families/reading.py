"""Read a rendered chat as a careful person would: where each turn's text stands, and what became of it.

This is a second reading, by marks that were written down by hand; it uses nothing of the module under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers.utils import chat_template_utils

from tests.lm.families.family import DROPS, REWRITES, Family, Reasons
from tests.lm.families.rows import Turn

# Marks that open and close reasoning.
BLOCKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))


@dataclass(frozen=True)
class Piece:
    """A text of a turn, and what became of it in the rendering.

    Attributes:
        text: As the row has it.
        start: Its first character in the rendering; -1 where it is not to be found.
        end: The character behind it.
        is_trimmed: Whether white space at its ends is gone.
        faults: The reasons for which the row can be refused; none where the text is whole.
        excuses: Reasons that are true as well where the text is written in another form, such as JSON.
        is_reasoning: Whether it is the reasoning of an answer.
    """

    text: str
    start: int
    end: int
    is_trimmed: bool = False
    faults: Reasons = frozenset()
    excuses: Reasons = frozenset()
    is_reasoning: bool = False


@dataclass(frozen=True)
class AnswerRegion:
    """Where an answer stands in a rendered chat, in characters.

    Attributes:
        opening: The end of the assistant's mark.
        content: The first character of the answer's own text.
        content_end: The character behind the last of its own texts.
        end: The character behind the mark that ends it; where there is none, `content_end`.
        mark: The mark that ends it, or None.
    """

    opening: int
    content: int
    content_end: int
    end: int
    mark: str | None


@contextmanager
def clock(day: str) -> Iterator[None]:
    """Let templates that read the clock see this day."""

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(f"{day}T12:00:00")

    real = chat_template_utils.datetime
    chat_template_utils.datetime = Day
    try:
        yield
    finally:
        chat_template_utils.datetime = real


def with_string_arguments(messages: Sequence[Turn]) -> list[Turn]:
    """Return the turns with every call's arguments as a JSON string."""

    def convert(call: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**turn, "tool_calls": [convert(c) for c in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]


def as_parts(messages: Sequence[Turn]) -> list[Turn]:
    """Return the turns with every content as a list of one text part."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]


def pieces_of(turn: Turn) -> list[tuple[str, bool]]:
    """Return the texts of a turn that must be in the rendering, in order, and whether each is reasoning."""
    texts = [(turn["reasoning_content"], True)] if turn.get("reasoning_content") else []
    texts += [(turn["content"], False)] if turn["content"] else []
    for call in turn.get("tool_calls") or []:
        texts += [(call["function"]["name"], False)]
        texts += [(leaf, False) for leaf in _leaves(call["function"]["arguments"])]
    return texts


def _leaves(value: Any) -> Iterator[str]:
    """Yield every text and number of an argument; templates write the rest of JSON in ways of their own."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def find_turn(rendered: str, turn: Turn, cursor: int) -> list[Piece]:
    """Find the texts of a turn, each behind the one before; what is not behind it may stand before it."""
    pieces = []
    for text, is_reasoning in pieces_of(turn):
        piece = _find(rendered, text, cursor, is_reasoning)
        cursor = max(cursor, piece.end)
        pieces.append(piece)
    return pieces


def _find(rendered: str, text: str, cursor: int, is_reasoning: bool) -> Piece:
    if (at := rendered.find(text, cursor)) >= 0:
        return Piece(text, at, at + len(text), is_reasoning=is_reasoning)

    # A text in quotes, as JSON writes it, is whole; a reader may also call it rewritten.
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    if escaped != text and (at := rendered.find(f'"{escaped}"', cursor)) >= 0:
        return Piece(text, at + 1, at + 1 + len(escaped), excuses=frozenset([REWRITES]), is_reasoning=is_reasoning)

    trimmed = text.strip()
    if trimmed and (at := rendered.find(trimmed, cursor)) >= 0:
        return Piece(text, at, at + len(trimmed), is_trimmed=True, is_reasoning=is_reasoning)

    # A template may take reasoning and answer apart, and put white space of its own around each.
    if match := _loose(text).search(rendered, cursor) if "</think>" in text else None:
        return Piece(text, match.start(), match.end(), is_trimmed=True, excuses=frozenset([REWRITES]))
    return Piece(text, -1, -1, faults=_faults(rendered[cursor:], text), is_reasoning=is_reasoning)


def _loose(text: str) -> re.Pattern[str]:
    """Return a pattern for the text with any line breaks around the marks of its reasoning."""
    parts = re.split(r"\n*(</?think>)\n*", text.strip())
    return re.compile(r"\n*".join(re.escape(part) for part in parts if part))


def _faults(rendered: str, text: str) -> Reasons:
    """Say whether a text that is not to be found was dropped or rewritten; in part it may be called either."""
    if "".join(text.split()) in "".join(rendered.split()):
        return frozenset([REWRITES])
    words = [part for part in re.split(r"\s+|(?<=>)|(?=</)", text) if part]
    return frozenset([DROPS, REWRITES]) if any(word in rendered for word in words) else frozenset([DROPS])


def next_opening(family: Family, rendered: str, cursor: int) -> int:
    """Return the end of the next assistant's mark, or the cursor where there is none."""
    return min(_openings(family, rendered, cursor), default=cursor)


def _openings(family: Family, rendered: str, cursor: int) -> list[int]:
    marks = [m for header in family.headers for m in re.finditer(re.escape(header), rendered)]
    return [m.end() for m in marks if m.start() >= cursor]


def find_answer(family: Family, rendered: str, pieces: list[Piece], cursor: int) -> AnswerRegion | None:
    """Find the region of the answer that has these texts, behind the turns before it."""
    if any(piece.start < 0 for piece in pieces):
        return None

    # The assistant's mark is the last one in front of the answer's first text; an empty answer has the next mark.
    first = pieces[0].start if pieces else None
    openings = [at for at in _openings(family, rendered, cursor) if first is None or at <= first]
    # Some templates write that mark with the question, so a chat's first turn has none.
    if not openings and cursor == 0 and first is not None:
        openings = [first]
    if not openings:
        return None
    opening = max(openings) if pieces else min(openings)

    content = next((p.start for p in pieces if not p.is_reasoning), opening)
    content_end = pieces[-1].end if pieces else opening
    ends = [(at, mark) for mark in family.ends if (at := rendered.find(mark, content_end)) >= 0]

    # Where the template writes no end, the next turn's mark is one if servers stop at it.
    nexts = [(at, mark) for mark in family.next_turns if (at := rendered.find(mark, content_end)) >= 0]
    if ends and (not nexts or min(ends) < min(nexts)):
        at, mark = min(ends)
        return AnswerRegion(opening, content, content_end, at + len(mark), mark)
    if nexts:
        at, mark = min(nexts)
        end, stop = (at + len(mark), mark) if mark in family.stops else (at, None)
        return AnswerRegion(opening, content, at, end, stop)
    return AnswerRegion(opening, content, len(rendered), len(rendered), None)


def opens_reasoning(text: str) -> bool:
    """Say whether a text opens a block of reasoning that it does not close."""
    return any(text.count(start) > text.count(end) for start, end in BLOCKS)
